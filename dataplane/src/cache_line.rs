//! What a processor can do with cache lines beyond loads and stores of words: copies of whole lines, and hints.
//!
//! Lines are shared with a peer process that may write at any time, so these are instructions (`asm!`) and not Rust's copies,
//! for which that would be a data race. The hints change nothing but times; processors that do not know them pass over them.
//! Where the processor cannot copy, nothing is copied here and the caller does it word by word.

use std::sync::atomic::AtomicU64;

/// A cache line: a mark, then payload.
pub(crate) const LINE_WORDS: usize = 8;
/// Payload of a line.
pub(crate) const LINE_BYTES: usize = (LINE_WORDS - 1) * size_of::<u64>();

pub(crate) type Line = [AtomicU64; LINE_WORDS];
pub(crate) type LinePayload = [u8; LINE_BYTES];

/// As `fence(SeqCst)`, for which compilers choose MFENCE: that waits for lines that were asked for beforehand, too, and costs three
/// times as much.
#[inline]
pub fn full_fence() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: adds nothing to a word at the end of the stack. A locked instruction orders all loads and stores around it, and the
    // compiler moves no access to memory over it.
    unsafe {
        std::arch::asm!("lock or dword ptr [rsp], 0");
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

/// Fetches a line for reading while other things are done.
#[inline]
pub(crate) fn fetch(byte: &u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it does not fault and changes no memory.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(std::ptr::from_ref(byte).cast());
    }
    let _ = byte;
}

/// Fetches a line for writing while other things are done. Without it the first store asks for the line.
#[inline]
pub(crate) fn claim<T>(line: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a hint; it does not fault and changes no memory.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags));
    }
    let _ = line;
}

/// Moves a line that was written towards the cache that all cores share: the reader finds it there sooner than in our own.
#[inline]
pub(crate) fn hand_on(line: &AtomicU64) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("cldemote [{}]", in(reg) line, options(nostack, preserves_flags));
    }
    let _ = line;
}

/// Writes `payload` into as many lines, each with a mark of 0. Returns how many it has written: all or none. The stores are
/// ordered as relaxed ones are.
///
/// # Panics
/// If there are not as many of both.
#[inline]
pub(crate) fn fill(lines: &[Line], payload: &[LinePayload]) -> usize {
    assert_eq!(lines.len(), payload.len());
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if !lines.is_empty() && std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: just asked for; there are as many of both, and at least one.
        unsafe { avx512::fill(lines, payload) };
        return lines.len();
    }
    0
}

/// Reads the payload of `lines` into as many `places`. Returns how many it has read: all or none. The loads are ordered as relaxed
/// ones are.
///
/// # Panics
/// If there are not as many of both.
#[inline]
pub(crate) fn read(lines: &[Line], places: &mut [LinePayload]) -> usize {
    assert_eq!(lines.len(), places.len());
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if !lines.is_empty() && std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: as above.
        unsafe { avx512::read(lines, places) };
        return lines.len();
    }
    0
}

/// A line is one load and one store, and lane 0, where the mark is, is masked out of one of them. Register 16, because the upper
/// halves of those below make older instructions slow until they are cleared.
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod avx512 {
    use super::{Line, LinePayload};

    const PAYLOAD_LANES: u32 = 0xfe;

    /// # Safety
    /// There are as many of both, and at least one; the processor has AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn fill(lines: &[Line], payload: &[LinePayload]) {
        // SAFETY: the loop runs once per line, and reads `payload` and writes `lines` as far as they go: what is masked out, 8
        // bytes in front of a line's payload, is not accessed. Atomics may be written through a shared reference.
        unsafe {
            std::arch::asm!(
                "kmovw {mask}, {bits:e}",
                "2:",
                "vmovdqu64 zmm16{{{mask}}}{{z}}, [{from} - 8]",
                "vmovdqu64 [{to}], zmm16",
                "add {from}, 56",
                "add {to}, 64",
                "dec {left}",
                "jnz 2b",
                mask = out(kreg) _,
                out("zmm16") _,
                bits = in(reg) PAYLOAD_LANES,
                from = inout(reg) payload.as_ptr() => _,
                to = inout(reg) lines.as_ptr() => _,
                left = inout(reg) lines.len() => _,
                options(nostack),
            );
        }
    }

    /// # Safety
    /// As for [`fill`].
    #[target_feature(enable = "avx512f")]
    pub unsafe fn read(lines: &[Line], places: &mut [LinePayload]) {
        // SAFETY: as in `fill`, with the 8 bytes masked out of the stores.
        unsafe {
            std::arch::asm!(
                "kmovw {mask}, {bits:e}",
                "2:",
                "vmovdqu64 zmm16, [{from}]",
                "vmovdqu64 [{to} - 8]{{{mask}}}, zmm16",
                "add {from}, 64",
                "add {to}, 56",
                "dec {left}",
                "jnz 2b",
                mask = out(kreg) _,
                out("zmm16") _,
                bits = in(reg) PAYLOAD_LANES,
                from = inout(reg) lines.as_ptr() => _,
                to = inout(reg) places.as_mut_ptr() => _,
                left = inout(reg) lines.len() => _,
                options(nostack),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    /// Nothing is written or read beside what was asked for, whatever the alignment; where the processor cannot, nothing at all.
    #[test]
    fn lines_are_copied_whole_and_nothing_beside_them() {
        let words: Vec<AtomicU64> = (0..80).map(|_| AtomicU64::new(u64::MAX)).collect();
        let value = |word: usize| words[word].load(Ordering::Relaxed);
        for (first, count) in [(8, 1), (3, 1), (8, 7), (5, 8), (0, 0)] {
            words.iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
            let bytes: Vec<u8> = (0..count * LINE_BYTES).map(|at| at as u8 ^ 0x5a).collect();
            let (payload, _) = bytes.as_chunks();
            let (lines, _) = words[first..first + count * LINE_WORDS].as_chunks::<LINE_WORDS>();
            let done = fill(lines, payload);
            assert!(done == count || done == 0);
            let written: Vec<u8> = (first..first + done * LINE_WORDS)
                .filter(|word| (word - first) % LINE_WORDS != 0)
                .flat_map(|word| value(word).to_ne_bytes())
                .collect();
            assert_eq!(written, bytes[..done * LINE_BYTES]);
            assert!((0..done).all(|line| value(first + line * LINE_WORDS) == 0));
            let beside = (0..first).chain(first + done * LINE_WORDS..80);
            assert!(beside.into_iter().all(|word| value(word) == u64::MAX));

            let mut back = vec![0xEE; 8 + count * LINE_BYTES + 8];
            let (places, _) = back[8..8 + count * LINE_BYTES].as_chunks_mut();
            let read = read(lines, places);
            assert_eq!(read, done);
            let end = 8 + read * LINE_BYTES;
            assert_eq!(back[8..end], bytes[..read * LINE_BYTES]);
            assert!(back[..8].iter().chain(&back[end..]).all(|&byte| byte == 0xEE));
        }
    }

    #[test]
    fn hints_change_nothing() {
        let word = AtomicU64::new(7);
        claim(&word);
        hand_on(&word);
        fetch(&7);
        assert_eq!(word.load(Ordering::Relaxed), 7);
    }
}
