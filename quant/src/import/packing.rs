//! Packers for the importers' tests: straight from the format descriptions, bit by bit.
//!
//! Nothing here shares code with the importers. Not here: assertions of one format.

use super::{RawTensor, RawType};
use crate::{Bits, Grouped};
use testkit::Rng;

/// A tensor that owns its parts.
#[derive(Debug, Clone)]
pub(super) struct Owned {
    pub(super) name: String,
    pub(super) dtype: RawType,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

impl Owned {
    pub(super) fn raw(&self) -> RawTensor<'_> {
        let Self { name, dtype, shape, bytes } = self;
        RawTensor { name, dtype: *dtype, shape, bytes }
    }

    pub(super) fn words(name: &str, shape: [usize; 2], words: &[u32]) -> Self {
        let bytes = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: RawType::I32, shape: shape.to_vec(), bytes }
    }

    pub(super) fn integers(name: &str, values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|w| w.to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: RawType::I32, shape: vec![values.len()], bytes }
    }

    pub(super) fn longs(name: &str, values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|w| w.to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: RawType::I64, shape: vec![values.len()], bytes }
    }

    /// Floats rounded to `dtype`.
    pub(super) fn floats(name: &str, dtype: RawType, shape: [usize; 2], values: &[f32]) -> Self {
        let bytes = |v: &f32| match dtype {
            RawType::F32 => v.to_le_bytes().to_vec(),
            RawType::F16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
            RawType::Bf16 => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
            other => panic!("{other} is no float"),
        };
        let bytes = values.iter().flat_map(bytes).collect();
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
    }
}

/// Words being packed, zero at first.
pub(super) struct Words(pub(super) Vec<u32>);

impl Words {
    pub(super) fn new(count: usize) -> Self {
        Self(vec![0; count])
    }

    /// Writes code `index` of a bit stream whose word `w` lies at `at(w)`.
    pub(super) fn put(&mut self, code: u8, index: usize, bits: usize, at: impl Fn(usize) -> usize) {
        for b in 0..bits {
            let bit = index * bits + b;
            self.0[at(bit / 32)] |= u32::from(code >> b & 1) << (bit % 32);
        }
    }
}

/// A quantized matrix in the plainest form.
#[derive(Debug, Clone)]
pub(super) struct Matrix {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) bits: usize,
    /// Columns of a group, none for the whole row.
    pub(super) group: Option<usize>,
    /// `[n][k]`
    pub(super) codes: Vec<Vec<u8>>,
    /// `[n][groups]`, exact in all three float types.
    pub(super) scales: Vec<Vec<f32>>,
    /// `[n][groups]`
    pub(super) zeros: Vec<Vec<u8>>,
    /// `[k]`
    pub(super) group_of: Vec<usize>,
}

impl Matrix {
    pub(super) fn random(
        rng: &mut Rng,
        [n, k]: [usize; 2],
        bits: usize,
        group: Option<usize>,
    ) -> Self {
        let groups = k.div_ceil(group.unwrap_or(k));
        let codes = |rng: &mut Rng, len| (0..len).map(|_| rng.below(1 << bits) as u8).collect();
        // Eight significant bits; negative and zero scales occur in real checkpoints.
        let scale = |rng: &mut Rng| (rng.below(255) as f32 - 127.0) / 1024.0;
        Self {
            n,
            k,
            bits,
            group,
            codes: (0..n).map(|_| codes(rng, k)).collect(),
            scales: (0..n).map(|_| (0..groups).map(|_| scale(rng)).collect()).collect(),
            zeros: (0..n).map(|_| codes(rng, groups)).collect(),
            group_of: (0..k).map(|c| c / group.unwrap_or(k)).collect(),
        }
    }

    /// Deals the columns out to the groups at random.
    pub(super) fn shuffle(mut self, rng: &mut Rng) -> Self {
        let order = rng.permutation(self.k);
        self.group_of = order.iter().map(|&c| self.group_of[c as usize]).collect();
        self
    }

    pub(super) fn groups(&self) -> usize {
        self.scales[0].len()
    }

    /// `[n, groups]` of a `[n][groups]` list.
    pub(super) fn flat<T: Copy>(rows: &[Vec<T>]) -> Vec<T> {
        rows.iter().flatten().copied().collect()
    }

    /// `[groups, n]` of a `[n][groups]` list.
    pub(super) fn flat_transposed<T: Copy>(rows: &[Vec<T>]) -> Vec<T> {
        (0..rows[0].len()).flat_map(|g| rows.iter().map(move |row| row[g])).collect()
    }

    pub(super) fn g_idx(&self) -> Vec<i32> {
        self.group_of.iter().map(|&g| g as i32).collect()
    }

    /// Panics unless `found` is this matrix, element by element.
    pub(super) fn assert_is(&self, found: &Grouped) {
        let shape = found.shape();
        assert_eq!([shape.n, shape.k], [self.n, self.k]);
        assert_eq!(shape.bits == Bits::Eight, self.bits == 8);
        let mut perm: Vec<u32> = (0..self.k as u32).collect();
        perm.sort_by_key(|&c| (self.group_of[c as usize], c));
        let sorted = perm.iter().enumerate().all(|(j, &c)| j == c as usize);
        assert_eq!(found.perm(), (!sorted).then_some(&perm[..]));
        for row in 0..self.n {
            for (j, &column) in perm.iter().enumerate() {
                let (column, at) = (column as usize, row * shape.groups() + j / shape.group);
                let group = self.group_of[column];
                assert_eq!(found.code(row, j), self.codes[row][column], "code {row}, {column}");
                assert_eq!(found.zeros()[at], self.zeros[row][group], "zero {row}, {group}");
                assert_eq!(found.scales()[at], self.scales[row][group], "scale {row}, {group}");
            }
        }
    }
}

/// Tensors of a GPTQ matrix; `less` is subtracted from the zero points (1 in version 1).
pub(super) fn gptq(m: &Matrix, less: u8, dtype: RawType) -> [Owned; 4] {
    let (rows, zero_columns) = (m.k * m.bits / 32, m.n * m.bits / 32);
    let mut qweight = Words::new(rows * m.n);
    let mut qzeros = Words::new(m.groups() * zero_columns);
    for row in 0..m.n {
        for column in 0..m.k {
            qweight.put(m.codes[row][column], column, m.bits, |w| w * m.n + row);
        }
        for group in 0..m.groups() {
            let zero = m.zeros[row][group].wrapping_sub(less);
            qzeros.put(zero, row, m.bits, |w| group * zero_columns + w);
        }
    }
    let scales = Matrix::flat_transposed(&m.scales);
    [
        Owned::words("m.qweight", [rows, m.n], &qweight.0),
        Owned::words("m.qzeros", [m.groups(), zero_columns], &qzeros.0),
        Owned::floats("m.scales", dtype, [m.groups(), m.n], &scales),
        Owned::integers("m.g_idx", &m.g_idx()),
    ]
}

/// Tensors of an AWQ matrix.
pub(super) fn awq(m: &Matrix, dtype: RawType) -> [Owned; 3] {
    let columns = m.n / 8;
    let mut qweight = Words::new(m.k * columns);
    let mut qzeros = Words::new(m.groups() * columns);
    for row in 0..m.n {
        // Outputs 0 to 7 of a word lie in these nibbles.
        let nibble = [0, 4, 1, 5, 2, 6, 3, 7][row % 8];
        for column in 0..m.k {
            qweight.put(m.codes[row][column], nibble, 4, |_| column * columns + row / 8);
        }
        for group in 0..m.groups() {
            qzeros.put(m.zeros[row][group], nibble, 4, |_| group * columns + row / 8);
        }
    }
    let scales = Matrix::flat_transposed(&m.scales);
    [
        Owned::words("m.qweight", [m.k, columns], &qweight.0),
        Owned::words("m.qzeros", [m.groups(), columns], &qzeros.0),
        Owned::floats("m.scales", dtype, [m.groups(), m.n], &scales),
    ]
}

/// Tensors of a compressed-tensors matrix: packed, scale, zero point, g_idx, shape.
pub(super) fn compressed(m: &Matrix, dtype: RawType) -> [Owned; 5] {
    let (columns, zero_rows) = ((m.k * m.bits).div_ceil(32), (m.n * m.bits).div_ceil(32));
    let mut packed = Words::new(m.n * columns);
    let mut zeros = Words::new(zero_rows * m.groups());
    for row in 0..m.n {
        for column in 0..m.k {
            packed.put(m.codes[row][column], column, m.bits, |w| row * columns + w);
        }
        for group in 0..m.groups() {
            zeros.put(m.zeros[row][group], row, m.bits, |w| w * m.groups() + group);
        }
    }
    [
        Owned::words("m.weight_packed", [m.n, columns], &packed.0),
        Owned::floats("m.weight_scale", dtype, [m.n, m.groups()], &Matrix::flat(&m.scales)),
        Owned::words("m.weight_zero_point", [zero_rows, m.groups()], &zeros.0),
        Owned::integers("m.weight_g_idx", &m.g_idx()),
        Owned::longs("m.weight_shape", &[m.n as i64, m.k as i64]),
    ]
}
