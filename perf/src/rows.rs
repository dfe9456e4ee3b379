//! What a run measures: which rows are wanted, and who takes them.

use std::fmt;
use std::ops::{Deref, DerefMut};

use anyhow::Result;

use crate::row::Row;

type Take = dyn FnMut(Row) -> Result<()>;

/// Called with each row that was measured, like the function that it holds. A group asks [`wants`](Self::wants) before it
/// measures a row, and [`wants_some`](Self::wants_some) before it prepares for several.
pub struct Rows {
    only: Vec<String>,
    /// How often a group that measures in passes does it; as it thinks best if absent.
    pub passes: Option<usize>,
    take: Box<Take>,
}

impl Rows {
    /// `only`: how the ids of the wanted rows begin; empty if all are wanted. Each row goes to `take`.
    pub fn new(only: Vec<String>, take: impl FnMut(Row) -> Result<()> + 'static) -> Rows {
        Rows { only, passes: None, take: Box::new(take) }
    }

    /// Whether the row `id` is to be measured.
    #[must_use]
    pub fn wants(&self, id: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|prefix| id.starts_with(prefix.as_str()))
    }

    /// Whether a row may be wanted whose id begins with `area`.
    #[must_use]
    pub fn wants_some(&self, area: &str) -> bool {
        self.wants(area) || self.only.iter().any(|prefix| prefix.starts_with(area))
    }
}

impl Deref for Rows {
    type Target = Take;

    fn deref(&self) -> &Take {
        &*self.take
    }
}

impl DerefMut for Rows {
    fn deref_mut(&mut self) -> &mut Take {
        &mut *self.take
    }
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rows").field("only", &self.only).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(only: &[&str]) -> Rows {
        Rows::new(only.iter().map(ToString::to_string).collect(), |_| Ok(()))
    }

    #[test]
    fn without_a_choice_everything_is_wanted() {
        assert!(rows(&[]).wants("a.b") && rows(&[]).wants_some("a"));
    }

    #[test]
    fn rows_are_chosen_by_how_their_ids_begin() {
        let chosen = rows(&["vhost.rx.64.ordered", "guest.redis"]);
        assert!(chosen.wants("guest.redis.c1.rps") && chosen.wants("vhost.rx.64.ordered"));
        assert!(!chosen.wants("vhost.rx.64") && !chosen.wants("guest.iperf.in"));
        assert!(chosen.wants_some("vhost.") && chosen.wants_some("guest.redis.c1.") && chosen.wants_some("guest"));
        assert!(!chosen.wants_some("fabric.") && !chosen.wants_some("guest.iperf"));
    }
}
