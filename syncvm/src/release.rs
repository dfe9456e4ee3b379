//! When may a held frame leave? The rule behind invariant I3, alone so that it can be read, and replaced.
//!
//! Now: after the syncvm that covers it. Later: as soon as the secondary has produced the same bytes
//! ("on agreement"), which is another implementation of [`ReleaseRule`] that answers to `Agreed`-like events.

/// Number of a slot, counted by whoever seals slots; ascending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SlotNumber(pub u64);

/// What happened that may let frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseEvent {
    /// The secondary acknowledged a syncvm of `view` whose sync point ends `slot`.
    Acknowledged {
        /// The view that the acknowledgement carries.
        view: u64,
        /// The last slot it covers.
        slot: SlotNumber,
    },
    /// `Second(none)` committed in `view`: the group serves without the hold.
    ServingAlone {
        /// The view it committed in.
        view: u64,
    },
    /// A secondary is being protected again: frames are held from now on.
    Paired,
    /// This replica is now in `view`; whatever older views promised no longer counts.
    ViewChanged {
        /// The new view.
        view: u64,
    },
}

/// Which frames leave now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// None.
    Nothing,
    /// All of this slot and earlier ones.
    Through(SlotNumber),
    /// All that are held.
    Everything,
}

/// Decides what leaves the guard. Pure.
pub trait ReleaseRule: Send {
    /// Takes an event and says what leaves because of it.
    fn on_event(&mut self, event: ReleaseEvent) -> Release;
    /// Whether a frame that the guest sends now must be held.
    fn holds(&self) -> bool;
}

/// Frames leave after the syncvm that covers them (PLOVER §4.4).
#[derive(Debug)]
pub struct AfterSyncvm {
    view: u64,
    alone: bool,
}

impl AfterSyncvm {
    /// The rule at the start of `view`: everything is held.
    #[must_use]
    pub fn new(view: u64) -> Self {
        Self { view, alone: false }
    }
}

impl ReleaseRule for AfterSyncvm {
    fn on_event(&mut self, event: ReleaseEvent) -> Release {
        match event {
            ReleaseEvent::Acknowledged { view, slot } if view == self.view => {
                Release::Through(slot)
            }
            ReleaseEvent::ServingAlone { view } if view == self.view => {
                self.alone = true;
                Release::Everything
            }
            ReleaseEvent::Acknowledged { .. } | ReleaseEvent::ServingAlone { .. } => {
                Release::Nothing
            }
            ReleaseEvent::Paired => {
                self.alone = false;
                Release::Nothing
            }
            ReleaseEvent::ViewChanged { view } => {
                self.view = view;
                self.alone = false;
                Release::Nothing
            }
        }
    }

    fn holds(&self) -> bool {
        !self.alone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leaves_on_the_word_of_another_view() {
        let mut rule = AfterSyncvm::new(4);
        let slot = SlotNumber(9);
        assert_eq!(
            rule.on_event(ReleaseEvent::Acknowledged { view: 3, slot }),
            Release::Nothing
        );
        assert_eq!(
            rule.on_event(ReleaseEvent::ServingAlone { view: 5 }),
            Release::Nothing
        );
        assert!(rule.holds());
        assert_eq!(
            rule.on_event(ReleaseEvent::Acknowledged { view: 4, slot }),
            Release::Through(slot)
        );
        assert_eq!(
            rule.on_event(ReleaseEvent::ServingAlone { view: 4 }),
            Release::Everything
        );
        assert!(!rule.holds());
        assert_eq!(rule.on_event(ReleaseEvent::Paired), Release::Nothing);
        assert!(rule.holds());
        rule.on_event(ReleaseEvent::ServingAlone { view: 4 });
        rule.on_event(ReleaseEvent::ViewChanged { view: 6 });
        assert!(rule.holds(), "a new view starts with the hold");
        assert_eq!(
            rule.on_event(ReleaseEvent::Acknowledged { view: 4, slot }),
            Release::Nothing
        );
    }
}
