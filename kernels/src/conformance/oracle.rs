//! What a case must give, computed a second time: one whole sequence after another, in f64,
//! without slots, steps, blocks or any code of a backend; with how far off a backend may be.
//!
//! Every element carries its error bounds in units of 2^-24, half a unit in the last place of
//! an f32 relative to its size:
//! - `once`: the result of exact arithmetic is rounded once (the reference);
//! - `many`: every product and sum is rounded (a float kernel);
//! - `int8`, absolute: activations are rounded to 127 steps of the largest in a weight group;
//! - `f16`, absolute: keys and values are stored in f16;
//! - `tensor`, absolute: what tensor cores round beyond a float kernel;
//! - `halves`, absolute, for weights of two bytes: activations are in two parts of the weights' type, and
//!   tensor instructions add.

use super::case::Case;
use crate::program::{Heads, KvLayer, Mask, Op, RopeDecl, RopeSpeeds, SlotId, WeightId};
use quant::{FloatType, Weight};
use std::collections::HashMap;
use std::ops::Range;

/// 2^-24: the relative error of rounding once to f32.
pub(super) const UNIT: f64 = 1.0 / 16_777_216.0;

/// 2^-11: the relative error of rounding once to f16.
const F16_UNIT: f64 = 1.0 / 2048.0;

/// Sums of ranges of columns, which are added in f32.
const RANGES: f64 = 8.0;

/// One expected number with its bounds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    pub(super) value: f64,
    pub(super) once: f64,
    pub(super) many: f64,
    pub(super) int8: f64,
    pub(super) f16: f64,
    pub(super) tensor: f64,
    pub(super) halves: Option<f64>,
}

impl Expected {
    /// A number every backend must copy bit for bit.
    fn exact(value: f64) -> Self {
        Self { value, once: 0.0, many: 0.0, int8: 0.0, f16: 0.0, tensor: 0.0, halves: None }
    }

    /// A number that depends on others of the given size, which f64 sums leave exact to 2^-44.
    fn new(value: f64, size: f64, many: f64) -> Self {
        let f64_sums = size / 1_048_576.0;
        let (once, many) = (value.abs() + f64_sums, value.abs() + many);
        Self { value, once, many, int8: 0.0, f16: 0.0, tensor: 0.0, halves: None }
    }
}

/// Rows of a slot by position.
type Matrix = Vec<Vec<Expected>>;

/// State of one sequence.
struct Sequence<'c> {
    case: &'c Case,
    index: usize,
    slots: HashMap<SlotId, Matrix>,
    kv: HashMap<KvLayer, [Vec<Vec<f64>>; 2]>,
}

/// Expected logits of every position of sequence `index`.
pub(super) fn expected(case: &Case, index: usize) -> Vec<Vec<Expected>> {
    let (slots, kv) = (HashMap::new(), HashMap::new());
    let mut sequence = Sequence { case, index, slots, kv };
    for step in &case.program.steps {
        sequence.run(&step.op);
    }
    sequence.slots[&case.program.logits].clone()
}

impl Sequence<'_> {
    fn run(&mut self, op: &Op) {
        match op {
            Op::Embed { table, out } => {
                let w = Logical::new(&self.case.weights[table.index()]);
                let tokens = &self.case.sequences[self.index];
                let rows = tokens.iter().map(|t| w.embedding(t.index())).collect();
                self.slots.insert(*out, rows);
            }
            Op::Norm { x, add, weight, eps, out } => {
                if let Some(add) = add {
                    self.residual(*x, *add);
                }
                let weight = self.vector(*weight);
                let rows = self.values(*x).iter().map(|x| normed(x, &weight, *eps)).collect();
                self.slots.insert(*out, rows);
            }
            Op::Linear { x, weight, bias, out } => {
                let w = Logical::new(&self.case.weights[weight.index()]);
                let bias = bias.map(|bias| self.vector(bias));
                let rows: Matrix =
                    self.values(*x).iter().map(|x| w.product(x, bias.as_deref())).collect();
                self.put(out.slot, out.start, &rows);
            }
            Op::HeadNorm { heads, weight, eps } => {
                let weight = self.vector(*weight);
                self.each_head(*heads, |_, head| normed(head, &weight, *eps));
            }
            Op::Rope { heads, rope } => {
                let decl = &self.case.program.ropes[rope.index()];
                let (case, index) = (self.case, self.index);
                self.each_head(*heads, |p, head| rotated(head, p, decl, case.rope_len(index, p)));
            }
            Op::KvWrite { layer, k, v } => {
                let columns = |heads: &Heads| -> Vec<Vec<f64>> {
                    let rows = self.values(heads.slot);
                    rows.iter().map(|row| row[span(heads)].to_vec()).collect()
                };
                let both = [columns(k), columns(v)];
                self.kv.insert(*layer, both);
            }
            Op::Attend { q, layer, mask, scale, out } => {
                let rows = self.attend(q, *layer, *mask, f64::from(*scale));
                self.slots.insert(*out, rows);
            }
            Op::Activate { kind: _, x, out } => {
                let rows = self.values(*x).iter().map(|x| activated(x)).collect();
                self.slots.insert(*out, rows);
            }
            Op::Gather { x, out } => {
                self.slots.insert(*out, self.slots[x].clone());
            }
        }
    }

    /// A slot's values as the f32 numbers they are in memory.
    fn values(&self, slot: SlotId) -> Vec<Vec<f64>> {
        let row = |row: &Vec<Expected>| row.iter().map(|e| f64::from(e.value as f32)).collect();
        self.slots[&slot].iter().map(row).collect()
    }

    fn vector(&self, id: WeightId) -> Vec<f64> {
        Logical::new(&self.case.weights[id.index()]).rows.remove(0)
    }

    /// `x += add`, a single f32 addition that every backend rounds alike.
    fn residual(&mut self, x: SlotId, add: SlotId) {
        let add = self.values(add);
        for (x, add) in self.slots.get_mut(&x).unwrap().iter_mut().zip(add) {
            for (x, add) in x.iter_mut().zip(add) {
                *x = Expected::exact(f64::from((x.value + add) as f32));
            }
        }
    }

    /// Writes columns of a slot, leaving the others.
    fn put(&mut self, slot: SlotId, start: usize, rows: &Matrix) {
        let width = self.case.program.slots[slot.index()].width;
        let blank = || vec![vec![Expected::exact(f64::NAN); width]; rows.len()];
        let all = self.slots.entry(slot).or_insert_with(blank);
        for (row, new) in all.iter_mut().zip(rows) {
            row[start..start + new.len()].copy_from_slice(new);
        }
    }

    fn each_head(&mut self, heads: Heads, change: impl Fn(usize, &[f64]) -> Vec<Expected>) {
        for i in 0..heads.count {
            let start = heads.start + i * heads.width;
            let rows = self.values(heads.slot);
            let changed = rows.iter().enumerate();
            let changed = changed.map(|(p, row)| change(p, &row[start..start + heads.width]));
            self.put(heads.slot, start, &changed.collect());
        }
    }

    fn attend(&self, q: &Heads, layer: KvLayer, mask: Mask, scale: f64) -> Matrix {
        let [keys, values] = &self.kv[&layer];
        let group = q.count / self.case.program.kv[layer.index()].heads;
        let one = |(position, row): (usize, &Vec<f64>)| {
            let first = match mask {
                Mask::Causal => 0,
                Mask::Window(w) => (position + 1).saturating_sub(w as usize),
            };
            let head = |i: usize| {
                let from = i / group * q.width;
                let columns = from..from + q.width;
                let part = |all: &[Vec<f64>]| -> Vec<Vec<f64>> {
                    all[first..=position].iter().map(|row| row[columns.clone()].to_vec()).collect()
                };
                let query = &row[q.start + i * q.width..][..q.width];
                attended(query, &part(keys), &part(values), scale)
            };
            (0..q.count).flat_map(head).collect()
        };
        self.values(q.slot).iter().enumerate().map(one).collect()
    }
}

fn span(heads: &Heads) -> Range<usize> {
    heads.start..heads.start + heads.count * heads.width
}

fn product(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn length(x: &[f64]) -> f64 {
    product(x, x).sqrt()
}

fn normed(x: &[f64], weight: &[f64], eps: f32) -> Vec<Expected> {
    let k = x.len() as f64;
    let root = (product(x, x) / k + f64::from(eps)).sqrt();
    let one = |(x, w): (&f64, &f64)| {
        let value = x * w / root;
        // The sum of k squares is off by up to sqrt(k) roundings, as errors of random sign are;
        // the factor and the two products round too, the last of them counted by `new`.
        Expected::new(value, value.abs(), value.abs() * (k.sqrt() + 2.0))
    };
    x.iter().zip(weight).map(one).collect()
}

fn rotated(head: &[f64], position: usize, decl: &RopeDecl, len: u32) -> Vec<Expected> {
    let half = decl.width / 2;
    let amplitude = f64::from(decl.amplitude);
    let mut out: Vec<Expected> = head.iter().map(|x| Expected::exact(*x)).collect();
    for i in 0..half {
        let (speed, doubt) = speed(decl, i, len);
        let angle = f64::from(position as f32 * speed);
        let (a, b) = (head[i], head[i + half]);
        let size = (a.abs() + b.abs()) * amplitude.abs();
        for (at, value) in
            [(i, a * angle.cos() - b * angle.sin()), (i + half, b * angle.cos() + a * angle.sin())]
        {
            // A float kernel rounds each cosine or sine and its product, then their sum.
            let mut element = Expected::new(value * amplitude, size, 2.0 * size);
            element.once += size * angle * doubt;
            element.many += size * angle * doubt;
            out[at] = element;
        }
    }
    out
}

/// Speed of pair `i` and its relative error in units: tables are exact; a base found at run time
/// goes through nine roundings (five for the base, then exponent, power, inverse).
fn speed(decl: &RopeDecl, i: usize, len: u32) -> (f32, f64) {
    match &decl.speeds {
        RopeSpeeds::Fixed(speeds) => (speeds[i], 0.0),
        RopeSpeeds::Switched { short, long, switch } => {
            (if len <= *switch { short[i] } else { long[i] }, 0.0)
        }
        RopeSpeeds::DynamicNtk { theta, factor, trained } => {
            let (width, factor) = (decl.width as f64, f64::from(*factor));
            let stretch = f64::from(len.max(*trained)) / f64::from(*trained);
            let base =
                f64::from(*theta) * (factor * stretch - (factor - 1.0)).powf(width / (width - 2.0));
            ((1.0 / base.powf(2.0 * i as f64 / width)) as f32, 9.0)
        }
    }
}

fn attended(q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>], scale: f64) -> Vec<Expected> {
    let scores: Vec<f64> = keys.iter().map(|k| scale * product(q, k)).collect();
    let most = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|w| w / total).collect();
    // Every product and sum of a score is rounded, and exp rounds its argument.
    let (e, n) = (q.len() as f64, keys.len() as f64);
    let sizes: Vec<f64> = keys.iter().map(|k| scale.abs() * length(q) * length(k)).collect();
    let doubts: Vec<f64> = sizes.iter().map(|size| UNIT * (e.sqrt() + 2.0) * size).collect();
    let rounded = Shifted::new(&weights, &doubts);
    let size = |k: &Vec<f64>| -> f64 { q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum() };
    let doubts: Vec<f64> = keys.iter().map(|k| F16_UNIT * scale.abs() * size(k)).collect();
    let stored = Shifted::new(&weights, &doubts);
    let doubts: Vec<f64> = keys
        .iter()
        .zip(&scores)
        .map(|(k, score)| tensor_doubt(q, k, scale, most - score))
        .collect();
    let on_tensors = Shifted::new(&weights, &doubts);
    let column = |j: usize| {
        let column: Vec<f64> = values.iter().map(|v| v[j]).collect();
        let value = product(&weights, &column);
        let size: f64 = weights.iter().zip(&column).map(|(w, v)| (w * v).abs()).sum();
        let many = size * n.sqrt() + rounded.error(&column, value) / UNIT;
        let mut element = Expected::new(value, size, many);
        element.f16 = stored.error(&column, value) + F16_UNIT * stored.size(&column);
        element.tensor = on_tensors.error(&column, value) + tensor_sums(keys.len()) * size;
        element
    };
    (0..q.len()).map(column).collect()
}

/// What a sum of `n` products on tensor cores is off by, relative to the sum of their sizes: an
/// instruction aligns 16 products and what was there before to the largest and cuts each off after 23
/// bits, so 17 times 2^-23 for each 16.
fn tensor_sums(n: usize) -> f64 {
    n.div_ceil(16) as f64 * 17.0 * 2.0 * UNIT
}

/// What the logarithm of a weight `2^x` is off by on tensor cores (`shaders/cuda/attention_mma.cu`);
/// its score is `below` the greatest.
fn tensor_doubt(q: &[f64], k: &[f64], scale: f64, below: f64) -> f64 {
    let size: f64 = scale.abs() * q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum::<f64>();
    let largest = q.iter().fold(0.0f64, |most, q| most.max(q.abs()));
    let all: f64 = scale.abs() * largest * k.iter().map(|k| k.abs()).sum::<f64>();
    // Queries of two f16 keep 22 bits, or lose half of 2^-24 where the largest is at least 2^14. They
    // are multiplied by a product of two numbers that were rounded.
    let queries = (4.0 + 3.0) * UNIT * size + UNIT / 32768.0 * all;
    let sums = (tensor_sums(q.len()) + UNIT) * size;
    // The exponent is rounded once after 15 was added, and 2^x is off by 2^-22 of it.
    let powers = UNIT * (below + 16.0) + 4.0 * UNIT;
    // Then it is rounded to f16, of which it is at most 2^15 and the greatest at least 2^14; below
    // 2^-14 it loses half of 2^-24, in all 2^-39 of the greatest weight, here relative to its own.
    let rounded = F16_UNIT + below.min(100.0).exp() * UNIT / 32768.0;
    queries + sums + powers + rounded
}

/// Softmax weights whose scores are each off by at most their doubt.
struct Shifted {
    /// How far each weight may move.
    moves: Vec<f64>,
    /// The largest each weight may become.
    most: Vec<f64>,
}

impl Shifted {
    /// With scores off by `doubts`, weight `w` of doubt `d` lies between `w e^-d / sum(w e^d)`
    /// and `w e^d / sum(w e^-d)`.
    fn new(weights: &[f64], doubts: &[f64]) -> Self {
        let both = || weights.iter().zip(doubts);
        let most_total: f64 = both().map(|(w, d)| w * d.exp()).sum();
        let least_total: f64 = both().map(|(w, d)| w * (-d).exp()).sum();
        let most = |(w, d): (&f64, &f64)| (w * d.exp() / least_total).min(1.0);
        let least = |(w, d): (&f64, &f64)| w * (-d).exp() / most_total;
        let moves = both().map(|(w, d)| (most((w, d)) - w).max(w - least((w, d)))).collect();
        Self { moves, most: both().map(most).collect() }
    }

    /// Bound on the error of the weighted sum `value` of `column`: weights sum to one before and
    /// after, so only differences from `value` count.
    fn error(&self, column: &[f64], value: f64) -> f64 {
        self.moves.iter().zip(column).map(|(m, v)| m * (v - value).abs()).sum()
    }

    /// Bound on the sum of sizes.
    fn size(&self, column: &[f64]) -> f64 {
        self.most.iter().zip(column).map(|(w, v)| w * v.abs()).sum()
    }
}

fn activated(x: &[f64]) -> Vec<Expected> {
    let (gate, up) = x.split_at(x.len() / 2);
    let one = |(gate, up): (&f64, &f64)| {
        let value = gate / (1.0 + (-gate).exp()) * up;
        // A float kernel's exp is off by up to two units in the last place, then its sum with one,
        // the quotient and the product round, the last counted by `new`.
        Expected::new(value, value.abs(), 6.0 * value.abs())
    };
    gate.iter().zip(up).map(one).collect()
}

/// A weight as real numbers in checkpoint column order.
struct Logical {
    /// `[n, k]`, before any rounding to f32.
    rows: Vec<Vec<f64>>,
    /// Group of each checkpoint column; none for floats.
    group_of: Option<Vec<usize>>,
    /// What floats are stored as.
    float: Option<FloatType>,
}

impl Logical {
    fn new(weight: &Weight<'_>) -> Self {
        let [n, k] = weight.shape();
        match weight {
            Weight::Dense(d) => {
                let values: Vec<f64> = d.to_f32().into_iter().map(f64::from).collect();
                let rows = values.chunks(k).map(<[f64]>::to_vec).collect();
                Self { rows, group_of: None, float: Some(d.float()) }
            }
            Weight::Grouped(g) => {
                let mut rows = vec![vec![0.0; k]; n];
                let mut group_of = vec![0; k];
                let (groups, size) = (g.shape().groups(), g.shape().group);
                for stored in 0..k {
                    let column = g.perm().map_or(stored, |perm| perm[stored] as usize);
                    group_of[column] = stored / size;
                    for (i, row) in rows.iter_mut().enumerate() {
                        let at = i * groups + stored / size;
                        let code = f64::from(g.code(i, stored)) - f64::from(g.zeros()[at]);
                        row[column] = code * f64::from(g.scales()[at]);
                    }
                }
                Self { rows, group_of: Some(group_of), float: None }
            }
        }
    }

    /// Floats widen exactly; a dequantized weight is rounded once.
    fn embedding(&self, token: usize) -> Vec<Expected> {
        let one = |value: &f64| match self.group_of {
            None => Expected::exact(*value),
            Some(_) => Expected::new(*value, 0.0, 0.0),
        };
        self.rows[token].iter().map(one).collect()
    }

    fn product(&self, x: &[f64], bias: Option<&[f64]>) -> Vec<Expected> {
        let steps = self.activation_steps(x);
        let one = |(j, row): (usize, &Vec<f64>)| {
            let bias = bias.map_or(0.0, |bias| bias[j]);
            let size: f64 = x.iter().zip(row).map(|(x, w)| (x * w).abs()).sum();
            let many = (x.len() as f64).sqrt() * length(x) * length(row) + bias.abs();
            let mut element = Expected::new(product(x, row) + bias, size, many);
            if self.group_of.is_some() {
                element.once += size;
                let half_step = |(w, step): (&f64, &f64)| w.abs() * step / 2.0;
                element.int8 = row.iter().zip(&steps).map(half_step).sum();
            }
            element.halves = self.parts_error(x, row, size).map(|parts| {
                // Two instructions for 16 columns. Each may cut the 16 products, the sum so far and the
                // result to 24 bits of the largest of them, which is less than the size of all.
                let cuts = 2.0 * x.len().div_ceil(16) as f64 * 18.0 + RANGES;
                parts + 1.01 * cuts * 2.0 * UNIT * size
            });
            element
        };
        self.rows.iter().enumerate().map(one).collect()
    }

    /// What a product is off by since activations are the sum of two parts of the weights' type, if so.
    fn parts_error(&self, x: &[f64], row: &[f64], size: f64) -> Option<f64> {
        match self.float? {
            FloatType::F32 => None,
            // Each part is off by 2^-11 of what it rounds, or by half of 2^-24, the smallest number,
            // where the row's largest activation is at least 2^14.
            FloatType::F16 => {
                let most = x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                let weights: f64 = row.iter().map(|w| w.abs()).sum();
                Some((-22f64).exp2() * size + (-39f64).exp2() * most * weights)
            }
            FloatType::Bf16 => Some((-16f64).exp2() * size),
        }
    }

    /// For each column the int8 step of its group's activations: the largest over 127.
    fn activation_steps(&self, x: &[f64]) -> Vec<f64> {
        let Some(group_of) = &self.group_of else { return vec![] };
        let mut largest: HashMap<usize, f64> = HashMap::new();
        for (x, group) in x.iter().zip(group_of) {
            let most = largest.entry(*group).or_default();
            *most = most.max(x.abs());
        }
        group_of.iter().map(|group| largest[group] / 127.0).collect()
    }
}
