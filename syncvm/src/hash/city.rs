//! CityHash 1.1, 128 bit, of whole pages: several at a time, and straight from guest memory.
//!
//! The function is a chain of dependent multiplications, so one page at a time leaves most of a core idle. Three pages side
//! by side hide that, and hide the time that memory takes to answer: pages scattered over more memory than the caches
//! hold are hashed 1.4 times as fast as one by one, and not copying them first makes it 1.7 times. (Measured with 2, 3 and
//! 4; the fourth does not fit the registers.) The crate `cityhash-rs` defines the result and the tests compare with it.

use super::PageHashValue;
use crate::page::{PAGE_BYTES, PageNumber};
use crate::ram::GuestRam;

/// Pages hashed side by side.
pub(super) const LANES: usize = 3;

const K0: u64 = 0xc3a5_c85c_97cb_3127;
const K1: u64 = 0xb492_b66f_be98_f273;
const K_MUL: u64 = 0x9ddf_ea08_eb38_2d69;
/// The first bytes are the seed.
const SEED_BYTES: usize = 16;
const STEP_BYTES: usize = 64;
/// Steps come in pairs.
const STEPS: usize = (PAGE_BYTES - SEED_BYTES) / (2 * STEP_BYTES) * 2;
const TAIL_BYTES: usize = 32;
const TAILS: usize = (PAGE_BYTES - SEED_BYTES - STEPS * STEP_BYTES).div_ceil(TAIL_BYTES);

const _: () = assert!(SEED_BYTES + STEPS * STEP_BYTES <= PAGE_BYTES && TAILS * TAIL_BYTES <= PAGE_BYTES);

/// A page that may be written meanwhile.
#[derive(Clone, Copy)]
struct Page(*const u8);

impl Page {
    #[inline(always)]
    fn word(self, at: usize) -> u64 {
        debug_assert!(at + 8 <= PAGE_BYTES);
        // SAFETY: `hash_pages` is promised PAGE_BYTES readable bytes, and every caller in this module asks for 8 bytes within
        // them. No reference is made; a word that is written meanwhile makes the hash a different one, no more.
        u64::from_le(unsafe { self.0.add(at).cast::<u64>().read_unaligned() })
    }
}

#[derive(Clone, Copy)]
struct State {
    x: u64,
    y: u64,
    z: u64,
    v: (u64, u64),
    w: (u64, u64),
}

/// The hash of a page in private memory.
pub(super) fn hash_page(page: &[u8; PAGE_BYTES]) -> PageHashValue {
    // SAFETY: the array has PAGE_BYTES bytes.
    let [hash] = unsafe { hash_pages([page.as_ptr()]) };
    hash
}

/// The hashes of `pages` of a guest, which may write them meanwhile (see [`GuestRam::read_page`] for why that is harmless).
///
/// # Panics
/// When a page lies beyond the RAM file, or `into` has another length.
pub(super) fn hash_guest_pages(ram: &GuestRam, pages: &[PageNumber], into: &mut [PageHashValue]) {
    assert_eq!(pages.len(), into.len(), "one hash per page");
    let (groups, rest) = pages.as_chunks::<LANES>();
    let (into_groups, into_rest) = into.as_chunks_mut::<LANES>();
    for (index, (group, into)) in groups.iter().zip(into_groups).enumerate() {
        if let Some(next) = groups.get(index + 1) {
            next.iter().for_each(|page| ram.prefetch(*page));
        }
        // SAFETY: `page_pointer` gives PAGE_BYTES mapped bytes, or panics.
        *into = unsafe { hash_pages(group.map(|page| ram.page_pointer(page).cast_const())) };
    }
    for (page, into) in rest.iter().zip(into_rest) {
        // SAFETY: as above.
        [*into] = unsafe { hash_pages([ram.page_pointer(*page).cast_const()]) };
    }
}

/// The hashes of `N` pages.
///
/// # Safety
/// Each pointer is to PAGE_BYTES readable bytes. They may change meanwhile; the hash is then that of some mixture.
#[inline(never)]
unsafe fn hash_pages<const N: usize>(pages: [*const u8; N]) -> [PageHashValue; N] {
    let pages = pages.map(Page);
    let mut states = pages.map(begin);
    for step_number in 0..STEPS {
        for (page, state) in pages.iter().zip(&mut states) {
            step(*page, SEED_BYTES + step_number * STEP_BYTES, state);
        }
    }
    std::array::from_fn(|lane| finish(pages[lane], states[lane]))
}

#[inline(always)]
fn begin(page: Page) -> State {
    let (x, y) = (page.word(0), page.word(8).wrapping_add(K0));
    let z = ((PAGE_BYTES - SEED_BYTES) as u64).wrapping_mul(K1);
    let v0 = (y ^ K1).rotate_right(49).wrapping_mul(K1).wrapping_add(page.word(SEED_BYTES));
    let v1 = v0.rotate_right(42).wrapping_mul(K1).wrapping_add(page.word(SEED_BYTES + 8));
    let w0 = y.wrapping_add(z).rotate_right(35).wrapping_mul(K1).wrapping_add(x);
    let w1 = x.wrapping_add(page.word(SEED_BYTES + 88)).rotate_right(53).wrapping_mul(K1);
    State { x, y, z, v: (v0, v1), w: (w0, w1) }
}

#[inline(always)]
fn step(page: Page, at: usize, state: &mut State) {
    let State { mut x, mut y, mut z, v, w } = *state;
    x = x.wrapping_add(y).wrapping_add(v.0).wrapping_add(page.word(at + 8)).rotate_right(37).wrapping_mul(K1);
    y = y.wrapping_add(v.1).wrapping_add(page.word(at + 48)).rotate_right(42).wrapping_mul(K1);
    x ^= w.1;
    y = y.wrapping_add(v.0).wrapping_add(page.word(at + 40));
    z = z.wrapping_add(w.0).rotate_right(33).wrapping_mul(K1);
    let v = weak(page, at, v.1.wrapping_mul(K1), x.wrapping_add(w.0));
    let w = weak(page, at + 32, z.wrapping_add(w.1), y.wrapping_add(page.word(at + 16)));
    *state = State { x: z, y, z: x, v, w };
}

#[inline(always)]
fn finish(page: Page, state: State) -> PageHashValue {
    let State { mut x, mut y, mut z, mut v, mut w } = state;
    x = x.wrapping_add(v.0.wrapping_add(z).rotate_right(49).wrapping_mul(K0));
    y = y.wrapping_mul(K0).wrapping_add(w.1.rotate_right(37));
    z = z.wrapping_mul(K0).wrapping_add(w.0.rotate_right(27));
    w.0 = w.0.wrapping_mul(9);
    v.0 = v.0.wrapping_mul(K0);
    for tail in 1..=TAILS {
        let at = PAGE_BYTES - tail * TAIL_BYTES;
        y = x.wrapping_add(y).rotate_right(42).wrapping_mul(K0).wrapping_add(v.1);
        w.0 = w.0.wrapping_add(page.word(at + 16));
        x = x.wrapping_mul(K0).wrapping_add(w.0);
        z = z.wrapping_add(w.1.wrapping_add(page.word(at)));
        w.1 = w.1.wrapping_add(v.0);
        v = weak(page, at, v.0.wrapping_add(z), v.1);
        v.0 = v.0.wrapping_mul(K0);
    }
    x = hash_16(x, v.0);
    y = hash_16(y.wrapping_add(z), w.0);
    let high = hash_16(x.wrapping_add(v.1), w.1).wrapping_add(y);
    let low = hash_16(x.wrapping_add(w.1), y.wrapping_add(v.1));
    (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
}

#[inline(always)]
fn weak(page: Page, at: usize, mut a: u64, mut b: u64) -> (u64, u64) {
    let last = page.word(at + 24);
    a = a.wrapping_add(page.word(at));
    b = b.wrapping_add(a).wrapping_add(last).rotate_right(21);
    let first = a;
    a = a.wrapping_add(page.word(at + 8)).wrapping_add(page.word(at + 16));
    b = b.wrapping_add(a.rotate_right(44));
    (a.wrapping_add(last), b.wrapping_add(first))
}

#[inline(always)]
fn hash_16(u: u64, v: u64) -> u64 {
    let mut a = (u ^ v).wrapping_mul(K_MUL);
    a ^= a >> 47;
    let mut b = (v ^ a).wrapping_mul(K_MUL);
    b ^= b >> 47;
    b.wrapping_mul(K_MUL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(pages: [&[u8]; LANES]) -> Result<(), TestCaseError> {
        assert!(pages.iter().all(|page| page.len() == PAGE_BYTES));
        let expected = pages.map(|page| cityhash_rs::cityhash_110_128(page).to_le_bytes());
        // SAFETY: the slices have PAGE_BYTES bytes each.
        prop_assert_eq!(unsafe { hash_pages(pages.map(<[u8]>::as_ptr)) }, expected);
        // SAFETY: as above.
        prop_assert_eq!(unsafe { hash_pages([pages[0].as_ptr()]) }[0], expected[0]);
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]
        #[test]
        fn equals_the_crate_on_any_pages_at_any_alignment(
            bytes in prop::collection::vec(any::<u8>(), LANES * PAGE_BYTES + 8), shift in 0usize..8
        ) {
            let page = |lane: usize| &bytes[shift + lane * PAGE_BYTES..][..PAGE_BYTES];
            check([page(0), page(1), page(2)])?;
        }
    }

    #[test]
    fn equals_the_crate_on_the_pages_that_guests_have_most() {
        let mut sparse = vec![0; PAGE_BYTES];
        sparse[PAGE_BYTES - 1] = 1;
        check([&[0; PAGE_BYTES], &[0xff; PAGE_BYTES], &sparse]).unwrap();
    }
}
