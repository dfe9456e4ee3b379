//! A small seeded generator (SplitMix64), so that a run can be repeated from its seed.
//!
//! Not a crate: the load client needs one number per operation and nothing else, and the test oracle must not change
//! its stream with a dependency's version.

/// Deterministic generator of 64-bit numbers; equal seeds give equal streams for ever.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// Starts the stream of `seed`.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next number of the stream.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, by multiplication (the bias is below 2^-32 for the bounds used here).
    ///
    /// # Panics
    /// If `bound` is 0.
    pub fn below(&mut self, bound: u32) -> u32 {
        assert!(bound > 0, "a range of no numbers has no member");
        (((self.next_u64() >> 32) * u64::from(bound)) >> 32) as u32
    }

    /// True with a probability of `percent` in 100.
    pub fn percent(&mut self, percent: u8) -> bool {
        self.below(100) < u32::from(percent)
    }
}
