//! The arithmetic of every op on plain slices; f64 inside, one rounding to f32 at the end.
//!
//! Suffixes: t rows, d model width, n/k output/input width of a linear, e head width, f
//! feed-forward width. Not here: slots, sequences, blocks. Lengths are as the contract says.

use super::Matrix;
use crate::program::{Activation, Mask, TokenId};
use std::ops::Range;

/// `sum(a * b)`. Eight partial sums, always the same ones for a length, only to save time.
fn dot(a_k: &[f32], b_k: &[f32]) -> f64 {
    let (a_chunks, a_rest) = a_k.as_chunks::<8>();
    let (b_chunks, b_rest) = b_k.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..8 {
            sums[i] += f64::from(a[i]) * f64::from(b[i]);
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    sums.iter().sum::<f64>() + rest
}

/// `out[t] = table[tokens[t]]`.
pub(super) fn embed(table: &Matrix, tokens: &[TokenId], out_td: &mut [f32]) {
    for (token, out_d) in tokens.iter().zip(out_td.chunks_exact_mut(table.k)) {
        out_d.copy_from_slice(table.row(token.index()));
    }
}

/// `x += other`, the residual add.
pub(super) fn add(x: &mut [f32], other: &[f32]) {
    for (x, other) in x.iter_mut().zip(other) {
        *x += other;
    }
}

/// `x = x / sqrt(mean(x^2) + eps) * weight`, one row or one head.
pub(super) fn norm(x_d: &mut [f32], weight_d: &[f32], eps: f32) {
    let mean_square = dot(x_d, x_d) / x_d.len() as f64;
    let inverse = 1.0 / (mean_square + f64::from(eps)).sqrt();
    for (x, weight) in x_d.iter_mut().zip(weight_d) {
        *x = (f64::from(*x) * inverse * f64::from(*weight)) as f32;
    }
}

/// `x * weight^T + bias`, `[rows, n]`; weight rows outermost, since each is read once then.
pub(super) fn linear(x_rk: &[f32], weight: &Matrix, bias_n: Option<&[f32]>) -> Vec<f32> {
    let n = weight.rows().count();
    let mut y_rn = vec![0.0; x_rk.len() / weight.k * n];
    for (j, w_k) in weight.rows().enumerate() {
        let bias = bias_n.map_or(0.0, |bias_n| f64::from(bias_n[j]));
        for (x_k, y_n) in x_rk.chunks_exact(weight.k).zip(y_rn.chunks_exact_mut(n)) {
            y_n[j] = (dot(x_k, w_k) + bias) as f32;
        }
    }
    y_rn
}

/// Turns column `i` of a head with column `i + width / 2` by `position * speeds[i]`; columns
/// beyond the rotary width stay.
///
/// The angle is an f32 product, as model code computes it: at position 100000 an angle rounded
/// later would differ in the third decimal.
pub(super) fn rotate(head_e: &mut [f32], position: u32, speeds: &[f32], amplitude: f32) {
    let half = speeds.len();
    for (i, speed) in speeds.iter().enumerate() {
        let angle = f64::from(position as f32 * speed);
        let (sin, cos) = angle.sin_cos();
        let (sin, cos) = (sin * f64::from(amplitude), cos * f64::from(amplitude));
        let (a, b) = (f64::from(head_e[i]), f64::from(head_e[i + half]));
        head_e[i] = (a * cos - b * sin) as f32;
        head_e[i + half] = (b * cos + a * sin) as f32;
    }
}

/// Positions that a query at `position` sees.
pub(super) fn visible(mask: Mask, position: u32) -> Range<u32> {
    let end = position + 1;
    match mask {
        Mask::Causal => 0..end,
        Mask::Window(w) => end.saturating_sub(w)..end,
    }
}

/// `softmax(scale * q k^T) v` of one query head over its visible keys and values, in order.
pub(super) fn attend<'a>(
    q_e: &[f32],
    keys: impl Iterator<Item = &'a [f32]>,
    values: impl Iterator<Item = &'a [f32]>,
    scale: f32,
    out_e: &mut [f32],
) {
    let scores: Vec<f64> = keys.map(|k_e| dot(q_e, k_e) * f64::from(scale)).collect();
    let most = scores.iter().fold(f64::NEG_INFINITY, |most, score| most.max(*score));
    let mut total = 0.0;
    let mut sum_e = vec![0.0f64; out_e.len()];
    for (score, v_e) in scores.iter().zip(values) {
        let weight = (score - most).exp();
        total += weight;
        for (sum, v) in sum_e.iter_mut().zip(v_e) {
            *sum += weight * f64::from(*v);
        }
    }
    for (out, sum) in out_e.iter_mut().zip(sum_e) {
        *out = (sum / total) as f32;
    }
}

/// `out = f(x[..f]) * x[f..]` of one row.
pub(super) fn activate(kind: Activation, x_2f: &[f32], out_f: &mut [f32]) {
    let (gate_f, up_f) = x_2f.split_at(out_f.len());
    for ((out, gate), up) in out_f.iter_mut().zip(gate_f).zip(up_f) {
        let gate = f64::from(*gate);
        let gate = match kind {
            Activation::Silu => gate / (1.0 + (-gate).exp()),
        };
        *out = (gate * f64::from(*up)) as f32;
    }
}

/// `out[r] = x[rows[r]]`.
pub(super) fn gather(x_td: &[f32], rows: &[u32], d: usize, out_rd: &mut [f32]) {
    for (row, out_d) in rows.iter().zip(out_rd.chunks_exact_mut(d)) {
        out_d.copy_from_slice(&x_td[*row as usize * d..][..d]);
    }
}
