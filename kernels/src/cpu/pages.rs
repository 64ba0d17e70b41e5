//! Memory for large weights: zeroed, and in huge pages where the system has them.
//!
//! A weight of gigabytes in pages of 4 KiB costs a page fault for each of them at load, which is
//! most of the loading time; pages of 2 MiB cost a five-hundredth of the faults. Not here: what
//! lies in it ([`super::packed`], [`super::dense`]).

use crate::Error;
use bytemuck::Pod;
use memmap2::MmapMut;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// `len` elements in pages of their own, zeros at first.
#[derive(Debug)]
pub(crate) struct Pages<T> {
    /// None where there is nothing to hold.
    map: Option<MmapMut>,
    element: PhantomData<T>,
}

impl<T: Pod> Pages<T> {
    /// Takes memory; none of it is touched yet.
    ///
    /// # Errors
    /// [`Error::Device`] if the system has no such memory left.
    pub(crate) fn zeroed(len: usize) -> Result<Self, Error> {
        let bytes = len.saturating_mul(size_of::<T>());
        let map = match bytes {
            0 => None,
            _ => Some(MmapMut::map_anon(bytes).map_err(|e| refused(bytes, &e))?),
        };
        #[cfg(target_os = "linux")]
        if let Some(map) = &map {
            // Only an optimisation: a system without huge pages keeps the small ones.
            drop(map.advise(memmap2::Advice::HugePage));
        }
        Ok(Self { map, element: PhantomData })
    }
}

fn refused(bytes: usize, e: &std::io::Error) -> Error {
    let reason = format!("no memory for a weight of {bytes} bytes ({e}): choose a smaller model");
    Error::Device { device: "cpu".to_owned(), reason }
}

impl<T: Pod> Deref for Pages<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        self.map.as_ref().map_or(&[], |map| bytemuck::cast_slice(map))
    }
}

impl<T: Pod> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.map.as_mut().map_or(&mut [], |map| bytemuck::cast_slice_mut(map))
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::Line;
    use super::*;

    #[test]
    fn pages_hold_as_many_zeros_as_asked_for() {
        let mut lines = Pages::<Line>::zeroed(3).unwrap();
        assert_eq!(*lines, [Line([0; 64]); 3]);
        lines[2].0[63] = 7;
        assert_eq!(lines[2].0[63], 7);
        assert!(Pages::<u16>::zeroed(0).unwrap().is_empty());
    }

    #[test]
    fn more_memory_than_there_is_is_refused() {
        let refused = Pages::<Line>::zeroed(usize::MAX / 2).unwrap_err().to_string();
        assert!(refused.starts_with("device cpu: no memory for a weight of "), "{refused}");
    }
}
