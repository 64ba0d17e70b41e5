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
