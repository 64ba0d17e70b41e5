//! Memory for weights and buffers: zeroed, one part behind the other, in huge pages where the system
//! has them.
//!
//! A weight of gigabytes in pages of 4 KiB costs a page fault for each of them at load, which is
//! most of the loading time, and at each of them the processor stops to read ahead; pages of 2 MiB
//! cost a five-hundredth of both. A weight by itself would leave a part of its last huge page
//! unused, or in small pages (a quarter of a model whose matrices have 2 to 12 MiB). Columns of a
//! matrix of activations touch a page for each row, more than a processor has translations for. Not
//! here: what lies in it ([`super::packed`], [`super::dense`], [`super::share`]).

use crate::Error;
use bytemuck::Pod;
use memmap2::{MmapMut, MmapRaw};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a huge page; memory is mapped in multiples of it.
const HUGE: usize = 2 << 20;
/// Least bytes mapped at once. What is not touched takes no memory.
const CHUNK: usize = 256 << 20;
/// Bytes that parts begin at a multiple of: those of a cache line.
const LINE: usize = 64;

/// Where the weights or the buffers of a model are taken from; their memory is given back with the
/// last of them.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    chunk: Mutex<Option<Chunk>>,
}

/// A mapping, and how much of it is given away.
#[derive(Debug)]
struct Chunk {
    map: Arc<MmapRaw>,
    used: usize,
}

/// `len` elements that nobody else has, zeros at first.
#[derive(Debug)]
pub(crate) struct Pages<T> {
    /// None where there is nothing to hold.
    map: Option<Arc<MmapRaw>>,
    /// First byte in the mapping.
    start: usize,
    len: usize,
    element: PhantomData<T>,
}

impl Arena {
    /// Takes memory; none of it is touched yet.
    ///
    /// # Errors
    /// [`Error::Device`] if the system has no such memory left.
    pub(crate) fn zeroed<T: Pod>(&self, len: usize) -> Result<Pages<T>, Error> {
        assert!(align_of::<T>() <= LINE, "elements of more than a cache line");
        let bytes = len.saturating_mul(size_of::<T>());
        if bytes == 0 {
            return Ok(Pages { map: None, start: 0, len: 0, element: PhantomData });
        }
        let mut chunk = self.chunk.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |chunk: &Chunk| chunk.map.len() - chunk.used >= bytes;
        let mut from = match chunk.take().filter(fits) {
            Some(chunk) => chunk,
            None => Chunk { map: Arc::new(map(bytes)?), used: 0 },
        };
        let (map, start) = (Some(Arc::clone(&from.map)), from.used);
        from.used = (start + bytes).next_multiple_of(LINE);
        *chunk = Some(from);
        Ok(Pages { map, start, len, element: PhantomData })
    }
}

/// Maps at least `bytes` zeros.
fn map(bytes: usize) -> Result<MmapRaw, Error> {
    let whole = bytes.max(CHUNK).checked_next_multiple_of(HUGE).unwrap_or(usize::MAX);
    let map = MmapMut::map_anon(whole).map_err(|e| refused(bytes, &e))?;
    // Only an optimisation: a system without huge pages keeps the small ones.
    #[cfg(target_os = "linux")]
    drop(map.advise(memmap2::Advice::HugePage));
    Ok(map.into())
}

fn refused(bytes: usize, e: &std::io::Error) -> Error {
    let reason =
        format!("no memory for {bytes} bytes ({e}): choose a smaller model or a shorter context");
    Error::Device { device: "cpu".to_owned(), reason }
}

impl<T: Pod> Pages<T> {
    /// Number of elements.
    pub(crate) fn count(&self) -> usize {
        self.len
    }

    /// The first element, without a reference to any of them.
    pub(crate) fn as_mut_ptr(&self) -> *mut T {
        match &self.map {
            // In bounds, since the part lies in the mapping.
            Some(map) => map.as_mut_ptr().wrapping_add(self.start).cast(),
            None => std::ptr::NonNull::dangling().as_ptr(),
        }
    }
}

impl<T: Pod> Deref for Pages<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        let Some(map) = &self.map else { return &[] };
        // SAFETY: `Arena::zeroed` gave this part of the mapping, aligned to `LINE`, to `self` alone,
        // and `T: Pod` is any bytes.
        unsafe { std::slice::from_raw_parts(map.as_ptr().add(self.start).cast(), self.len) }
    }
}

impl<T: Pod> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let Some(map) = &self.map else { return &mut [] };
        // SAFETY: as above, and `self` is borrowed for as long as the part is written.
        unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().add(self.start).cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::Line;
    use super::*;

    #[test]
    fn pages_hold_as_many_zeros_as_asked_for() {
        let arena = Arena::default();
        let mut lines = arena.zeroed::<Line>(3).unwrap();
        assert_eq!(*lines, [Line([0; 64]); 3]);
        lines[2].0[63] = 7;
        assert_eq!(lines[2].0[63], 7);
        assert!(arena.zeroed::<u16>(0).unwrap().is_empty());
    }

    #[test]
    fn more_memory_than_there_is_is_refused() {
        let refused = Arena::default().zeroed::<Line>(usize::MAX / 2).unwrap_err().to_string();
        assert!(refused.starts_with("device cpu: no memory for "), "{refused}");
    }

    #[test]
    fn parts_are_apart_and_outlive_the_arena() {
        let arena = Arena::default();
        let mut parts: Vec<Pages<u8>> =
            [3, 100, CHUNK, 64].into_iter().map(|len| arena.zeroed(len).unwrap()).collect();
        drop(arena);
        for (i, part) in parts.iter_mut().enumerate() {
            let end = part.len() - 1;
            assert_eq!((part[0], part[end]), (0, 0), "part {i}");
            (part[0], part[end]) = (i as u8 + 1, i as u8 + 1);
        }
        for (i, part) in parts.iter().enumerate() {
            assert_eq!((part[0], part[part.len() - 1]), (i as u8 + 1, i as u8 + 1), "part {i}");
            assert!(part.as_ptr().addr().is_multiple_of(LINE));
        }
    }
}
