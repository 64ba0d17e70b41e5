//! The oracle: obvious scalar dequantisation and matrix products in f64 accumulation.
//!
//! Not for speed: every fast kernel is compared with these loops. Input: canonical weights.

use crate::{Dense, Grouped, Weight};

/// Row `row` of a grouped matrix in *checkpoint* column order, in f32: `(code - zero) * scale`.
pub fn dequantize_row(w: &Grouped, row: usize) -> Vec<f32> {
    let shape = w.shape();
    let mut out_k = vec![0.0; shape.k];
    for j in 0..shape.k {
        let at = row * shape.groups() + j / shape.group;
        let code = f32::from(w.code(row, j)) - f32::from(w.zeros()[at]);
        out_k[w.perm().map_or(j, |p| p[j] as usize)] = code * w.scales()[at];
    }
    out_k
}

/// Row `row` of any weight in f32, checkpoint column order.
pub fn row(w: &Weight<'_>, row: usize) -> Vec<f32> {
    match w {
        Weight::Grouped(g) => dequantize_row(g, row),
        Weight::Dense(d) => dense_row(d, row),
    }
}

fn dense_row(d: &Dense<'_>, row: usize) -> Vec<f32> {
    let mut out_k = vec![0.0; d.shape()[1]];
    d.row(row, &mut out_k);
    out_k
}

/// `y[t, n] = x[t, k] * w[n, k]^T`, accumulated in f64 and rounded once.
pub fn matmul(x_tk: &[f32], w: &Weight<'_>) -> Vec<f32> {
    let [n, k] = w.shape();
    let t = x_tk.len() / k;
    let mut y_tn = vec![0.0; t * n];
    for j in 0..n {
        let w_k = row(w, j);
        for (i, x_k) in x_tk.chunks_exact(k).enumerate() {
            let sum: f64 = x_k.iter().zip(&w_k).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            y_tn[i * n + j] = sum as f32;
        }
    }
    y_tn
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bits, GroupedParts, GroupedShape};

    /// Rows `[0, 1, 2, 3]` and `[4, 5, 6, 7]` of codes in groups of two.
    fn grouped(perm: Option<Vec<u32>>) -> Grouped {
        let parts = GroupedParts {
            shape: GroupedShape { n: 2, k: 4, group: 2, bits: Bits::Four },
            codes: vec![0x10, 0x32, 0x54, 0x76],
            scales: vec![1.0, -2.0, 0.5, 0.25],
            zeros: vec![8, 3, 0, 15],
            perm,
        };
        Grouped::new("w", parts).unwrap()
    }

    #[test]
    fn rows_are_scale_times_code_less_zero() {
        let w = grouped(None);
        assert_eq!(dequantize_row(&w, 0), [-8.0, -7.0, 2.0, 0.0]);
        assert_eq!(dequantize_row(&w, 1), [2.0, 2.5, -2.25, -2.0]);
    }

    #[test]
    fn permuted_columns_return_to_their_place() {
        let w = grouped(Some(vec![3, 0, 1, 2]));
        assert_eq!(dequantize_row(&w, 0), [-7.0, 2.0, 0.0, -8.0]);
    }

    #[test]
    fn products_of_both_kinds_of_weight_agree() {
        let quantized = grouped(Some(vec![3, 0, 1, 2]));
        let rows: Vec<f32> = (0..2).flat_map(|r| dequantize_row(&quantized, r)).collect();
        let dense = Weight::Dense(Dense::from_f32([2, 4], &rows));
        let x_tk = [1.0, 0.0, 2.0, -1.0, 0.5, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0];
        let y_tn = matmul(&x_tk, &Weight::Grouped(quantized));
        assert_eq!(y_tn, [1.0, -3.5, 4.5, -8.0 + 0.25, -8.0, 2.0]);
        assert_eq!(y_tn, matmul(&x_tk, &dense));
    }

    #[test]
    fn sums_are_rounded_once() {
        // In f32 the ones would vanish beside 2^25.
        let w = Weight::Dense(Dense::from_f32([1, 4], &[1.0; 4]));
        let big = (1u32 << 25) as f32;
        assert_eq!(matmul(&[big, 1.0, 1.0, -big], &w), [2.0]);
    }
}
