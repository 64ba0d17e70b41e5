//! Memory that the threads of a team read and write at once, each its own part.
//!
//! Between two barriers every element is either read by any number of threads or touched by one
//! thread alone. The compiler cannot see barriers, so handing out a part is `unsafe`; the parts
//! themselves ([`Mat`], [`MatMut`]) are checked and safe. Not here: who gets which part
//! ([`super::exec`]).

use super::pages::{Arena, Pages};
use crate::Error;
use bytemuck::Pod;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering};

/// A buffer whose parts go to different threads: the only access through `&Shared` is by unsafe
/// methods, whose callers promise that no two threads touch an element at once unless both only
/// read it.
pub(crate) struct Shared<T> {
    pages: Pages<T>,
}

impl<T> std::fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl<T: Pod> Shared<T> {
    /// `len` zeros, the first at the start of a cache line.
    ///
    /// # Errors
    /// [`Error::Device`] if the system has no such memory left.
    pub(crate) fn new(arena: &Arena, len: usize) -> Result<Self, Error> {
        Ok(Self { pages: arena.zeroed(len)? })
    }

    /// Bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        self.pages.count() * size_of::<T>()
    }

    fn cells(&self) -> &[UnsafeCell<T>] {
        // SAFETY: UnsafeCell<T> has the memory layout of T, and nobody has a reference to an element
        // but through these cells or through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.pages.as_mut_ptr().cast(), self.pages.count()) }
    }

    /// Everything, while no other thread has a part.
    pub(crate) fn all_mut(&mut self) -> &mut [T] {
        &mut self.pages
    }

    /// Elements `range` for reading.
    ///
    /// # Safety
    /// No thread may write any of them while the slice lives.
    pub(crate) unsafe fn read(&self, range: Range<usize>) -> &[T] {
        let cells = &self.cells()[range];
        // SAFETY: same layout; the caller promises that nobody writes.
        unsafe { &*(&raw const *cells as *const [T]) }
    }

    /// Everything for reading.
    ///
    /// # Safety
    /// As of [`read`](Self::read).
    pub(crate) unsafe fn read_all(&self) -> &[T] {
        // SAFETY: the caller's promise.
        unsafe { self.read(0..self.pages.count()) }
    }
}

/// Takes single elements from any thread.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sink<'a>(&'a [AtomicU16]);

impl Sink<'_> {
    /// Stores one element; of two threads storing to the same one, either wins.
    #[inline(always)]
    pub(crate) fn store(&self, index: usize, value: u16) {
        self.0[index].store(value, Ordering::Relaxed);
    }
}

impl Shared<u16> {
    /// The whole buffer for storing, while no other thread has a part.
    #[cfg(test)]
    pub(crate) fn sink_mut(&mut self) -> Sink<'_> {
        // SAFETY: `&mut self` is exclusive.
        unsafe { self.sink() }
    }

    /// The whole buffer for storing.
    ///
    /// # Safety
    /// No slice of [`read`](Self::read) may live beside it.
    pub(crate) unsafe fn sink(&self) -> Sink<'_> {
        // SAFETY: AtomicU16 has the memory layout of u16, and all other accesses are such stores.
        Sink(unsafe { &*(&raw const *self.cells() as *const [AtomicU16]) })
    }
}

/// Where the columns of a matrix lie in a buffer: row `i` is
/// `offset + i * stride ..` for `width` elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) offset: usize,
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) width: usize,
}

impl Place {
    /// Its columns `start..start + width`.
    pub(crate) fn columns(self, start: usize, width: usize) -> Self {
        assert!(start + width <= self.width, "columns {start}+{width} of {}", self.width);
        Self { offset: self.offset + start, width, ..self }
    }

    /// Its rows `range`.
    pub(crate) fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "{range:?} of {}", self.rows);
        Self { offset: self.offset + range.start * self.stride, rows: range.len(), ..self }
    }

    /// From its first element to the one behind its last.
    fn extent(self) -> Range<usize> {
        let len = if self.rows == 0 { 0 } else { (self.rows - 1) * self.stride + self.width };
        self.offset..self.offset + len
    }
}

/// Rows to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    stride: usize,
    width: usize,
}

impl<'a> Mat<'a> {
    /// Rows of `width` elements, one after another.
    #[cfg(test)]
    pub(crate) fn new(data: &'a [f32], width: usize) -> Self {
        Self { data, stride: width, width }
    }

    /// Row `i`.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.width]
    }
}

/// Rows to write, by this thread alone.
#[derive(Debug)]
pub(crate) struct MatMut<'a, T = f32> {
    data: *mut T,
    place: Place,
    life: PhantomData<&'a mut [T]>,
}

impl<'a, T> MatMut<'a, T> {
    /// All of `data` as rows of `width` elements.
    #[cfg(test)]
    pub(crate) fn new(data: &'a mut [T], width: usize) -> Self {
        Self::columns(data, width, 0..width)
    }

    /// Columns `range` of `data` as rows of `stride` elements.
    #[cfg(test)]
    pub(crate) fn columns(data: &'a mut [T], stride: usize, range: Range<usize>) -> Self {
        let place = Place { offset: 0, stride, rows: data.len() / stride, width: stride };
        Self::at(data, place.columns(range.start, range.len()))
    }

    /// The elements of `data` at `place`.
    #[cfg(test)]
    pub(crate) fn at(data: &'a mut [T], place: Place) -> Self {
        let (data, life) = (&raw mut data[place.extent()], PhantomData);
        Self { data: data.cast(), place, life }
    }

    /// Number of rows.
    #[inline(always)]
    pub(crate) fn rows(&self) -> usize {
        self.place.rows
    }

    /// Row `i`.
    #[inline(always)]
    pub(crate) fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.place.rows, "row {i} of {}", self.place.rows);
        // SAFETY: whoever made `self` checked that its place lies in the buffer and promised that
        // these columns are its own; `&mut self` keeps it to one row at a time.
        unsafe {
            let start = self.data.add(i * self.place.stride);
            std::slice::from_raw_parts_mut(start, self.place.width)
        }
    }
}

impl Shared<f32> {
    /// A matrix for reading.
    ///
    /// # Safety
    /// No thread may write any of its elements, or any element between them, while it lives.
    pub(crate) unsafe fn mat(&self, place: Place) -> Mat<'_> {
        // SAFETY: the caller's promise covers the whole extent.
        let data = unsafe { self.read(place.extent()) };
        Mat { data, stride: place.stride, width: place.width }
    }
}

impl<T: Pod> Shared<T> {
    /// A matrix for writing.
    ///
    /// # Safety
    /// No other part of its elements may be read or written while it lives; elements between its
    /// rows may.
    pub(crate) unsafe fn mat_mut(&self, place: Place) -> MatMut<'_, T> {
        let cells = &self.cells()[place.extent()];
        let data = UnsafeCell::raw_get(cells.as_ptr());
        MatMut { data, place, life: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_two_writers_interleave() {
        let mut shared = Shared::<f32>::new(&Arena::default(), 12).unwrap();
        let all = Place { offset: 0, stride: 4, rows: 3, width: 4 };
        // SAFETY: columns 0..1 and 1..4 are disjoint.
        let (mut a, mut b) =
            unsafe { (shared.mat_mut(all.columns(0, 1)), shared.mat_mut(all.columns(1, 3))) };
        for i in 0..3 {
            a.row(i)[0] = 1.0;
            b.row(i).fill(i as f32 + 2.0);
        }
        assert_eq!(shared.all_mut(), [1., 2., 2., 2., 1., 3., 3., 3., 1., 4., 4., 4.]);
    }
}
