//! The one memory map of this crate, behind a safe type.
//!
//! Contract with the user: a weight file is not modified or truncated while the program runs.
//! Breaking it makes reads return the new bytes (wrong numbers) or, past a new end of the file,
//! kills the process with SIGBUS; no library can prevent that for mapped files.
//!
//! Not here: what the bytes mean ([`super::header`]). Input: an open file.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;

/// A read-only map of a whole file.
#[derive(Debug)]
pub(super) struct Map(memmap2::Mmap);

impl Map {
    /// Maps `file`, which must not be empty.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: sound only as long as nobody modifies the file while it is mapped, which
        // nothing here can enforce: it is the documented contract of this module. The map itself
        // is read-only and lives as long as the slices handed out.
        let map = unsafe { memmap2::Mmap::map(file)? };
        Ok(Self(map))
    }

    /// All bytes of the file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Tells the system that the pages of `range` are not needed for now; reading them again is
    /// allowed and reads the file again. Failure only means that memory stays in use.
    #[cfg(unix)]
    pub(super) fn release(&self, range: Range<usize>) {
        if range.is_empty() || range.end > self.0.len() {
            return;
        }
        // SAFETY: the range lies inside the map. The map is shared and read-only, so dropping its
        // pages loses nothing: the next access faults them in again with the same bytes.
        let dropped = unsafe {
            self.0.unchecked_advise_range(
                memmap2::UncheckedAdvice::DontNeed,
                range.start,
                range.len(),
            )
        };
        // Only an optimisation: a system that refuses keeps the pages, nothing else changes.
        drop(dropped);
    }

    /// Systems without page advice keep the pages.
    #[cfg(not(unix))]
    pub(super) fn release(&self, _range: Range<usize>) {}
}
