//! Rotary positions: tables of sine and cosine for the tokens of a step, and the rotation.
//!
//! ```text
//! angle = position * speed (f32); table row of a token: width / 2 cosines, width / 2 sines
//! a' = a cos - b sin    b' = b cos + a sin    for columns a = i, b = i + width / 2 of each head
//! split tokens over threads; the tables serve every layer of the step
//! ```
//! Tables are made per step, not per model: that treats all kinds of speeds alike and costs some
//! microseconds a token. Sine and cosine are those of the standard library, in f64. Reference:
//! `reference::` rope.

use super::isa::Kernel;
use super::share::{Mat, MatMut};
use super::simd::Simd;
use crate::program::RopeDecl;
use crate::reference::rope::speeds;

/// Fills the table row of a token: cosines, then sines, times the amplitude.
pub(crate) fn table_row(decl: &RopeDecl, position: u32, length: u32, row: &mut [f32]) {
    let (speeds, amplitude) = (speeds(decl, length), f64::from(decl.amplitude));
    let (cosines, sines) = row.split_at_mut(decl.width / 2);
    for ((cosine, sine), speed) in cosines.iter_mut().zip(sines).zip(&*speeds) {
        let angle = f64::from(position as f32 * speed);
        let (s, c) = angle.sin_cos();
        *cosine = (c * amplitude) as f32;
        *sine = (s * amplitude) as f32;
    }
}

/// Rotates heads in place.
#[derive(Debug)]
pub(crate) struct Rotate<'a> {
    /// `[rows, heads * head_width]`
    pub(crate) heads: MatMut<'a>,
    pub(crate) head_width: usize,
    /// `[rows, rotary width]`
    pub(crate) table: Mat<'a>,
}

impl Kernel for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for i in 0..self.heads.rows() {
            let table = self.table.row(i);
            let (cosines, sines) = table.split_at(table.len() / 2);
            for head in self.heads.row(i).chunks_exact_mut(self.head_width) {
                rotate(&mut head[..table.len()], cosines, sines);
            }
        }
    }
}

/// Products and sums, each rounded: the same bits with any instruction set.
#[inline(always)]
fn rotate(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (first, second) = head.split_at_mut(cosines.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::machines;
    use super::*;
    use crate::program::RopeSpeeds;

    #[test]
    fn a_pair_turns_and_the_rest_stays() {
        let decl = RopeDecl { width: 2, speeds: RopeSpeeds::Fixed(vec![0.5]), amplitude: 2.0 };
        let mut table = [0.0; 2];
        table_row(&decl, 3, 0, &mut table);
        assert_eq!(table, [(2.0 * 1.5f64.cos()) as f32, (2.0 * 1.5f64.sin()) as f32]);
        for machine in machines() {
            let mut row = [1.0; 6];
            let heads = MatMut::new(&mut row, 6);
            machine.run(Rotate { heads, head_width: 3, table: Mat::new(&table, 2) });
            let [cos, sin] = table;
            let head = [cos - sin, cos + sin, 1.0];
            assert_eq!(row, *[head, head].concat());
        }
    }
}
