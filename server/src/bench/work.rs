//! What a step must move and compute at least, counted from its program.
//!
//! Bytes are every weight once a step and the visible keys and values of each sequence once;
//! activations are left out, they stay in caches. Operations are two for each weight of a linear
//! and row. Not here: times.

use kernels::program::{Mask, Op, Program, Rows};
use quant::Format;
use std::ops::AddAssign;

/// The least that some steps take.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Work {
    pub(crate) bytes: f64,
    /// Multiplications and additions of all linears.
    pub(crate) ops: f64,
    /// Of those, the ones of linears over quantized weights.
    pub(crate) int_ops: f64,
}

impl AddAssign for Work {
    fn add_assign(&mut self, more: Self) {
        self.bytes += more.bytes;
        self.ops += more.ops;
        self.int_ops += more.int_ops;
    }
}

/// The costs of a program.
#[derive(Debug, Clone)]
pub(crate) struct Costs {
    /// Of each row of a token and, last, of each row whose logits are wanted.
    rows: [PerRow; 2],
    /// Bytes of one row of the embedding.
    embedding: f64,
    layers: Vec<Layer>,
}

#[derive(Debug, Clone, Copy, Default)]
struct PerRow {
    /// Bytes of weights, however many rows there are.
    weights: f64,
    ops: f64,
    int_ops: f64,
}

#[derive(Debug, Clone, Copy)]
struct Layer {
    /// Bytes of keys and values of a position.
    bytes: f64,
    /// Positions that a row sees at most.
    window: usize,
}

impl Costs {
    /// Of `program` where a key or value takes `kv_bytes` bytes.
    pub(crate) fn new(program: &Program, kv_bytes: f64) -> Self {
        let mut costs = Self { rows: Default::default(), embedding: 0.0, layers: vec![] };
        for step in &program.steps {
            let bytes = program.step_weight_bytes(step) as f64;
            match step.op {
                Op::Embed { .. } => costs.embedding += bytes,
                Op::Linear { x, weight, .. } => {
                    let decl = &program.weights[weight.index()];
                    let ops = 2.0 * (decl.shape[0] * decl.shape[1]) as f64;
                    let rows = program.slots[x.index()].rows;
                    let row = &mut costs.rows[usize::from(rows == Rows::Outputs)];
                    row.ops += ops;
                    if matches!(decl.format, Format::Grouped { .. }) {
                        row.int_ops += ops;
                    }
                    row.weights += bytes;
                }
                Op::Attend { layer, mask, .. } => {
                    let kv = program.kv[layer.index()];
                    let window = match mask {
                        Mask::Causal => usize::MAX,
                        Mask::Window(window) => window as usize,
                    };
                    let bytes = 2.0 * (kv.heads * kv.head_width) as f64 * kv_bytes;
                    costs.layers.push(Layer { bytes, window });
                }
                _ => costs.rows[0].weights += bytes,
            }
        }
        costs
    }

    /// Of a step in which each of `sequences` computes `rows` rows, the last at position
    /// `context - 1`, and `outputs` rows in all give logits.
    pub(crate) fn step(
        &self,
        sequences: usize,
        rows: usize,
        context: usize,
        outputs: usize,
    ) -> Work {
        let tokens = sequences * rows;
        let seen = |layer: &Layer| {
            let positions = layer.window.saturating_add(rows - 1).min(context);
            layer.bytes * positions as f64
        };
        let kv: f64 = self.layers.iter().map(seen).sum();
        let mut work = Work {
            bytes: self.embedding * tokens as f64 + kv * sequences as f64,
            ..Work::default()
        };
        for (row, count) in self.rows.iter().zip([tokens, outputs]) {
            let weights = if count > 0 { row.weights } else { 0.0 };
            let count = count as f64;
            work += Work { bytes: weights, ops: row.ops * count, int_ops: row.int_ops * count };
        }
        work
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::families::shapes;
    use engine::synthetic::{Formats, SyntheticModel};
    use quant::{Bits, FloatType};

    fn costs(name: &str) -> (Program, Costs) {
        let layers = Format::Grouped { bits: Bits::Four, group: 128, act_order: false };
        let spec = shapes::find(name).unwrap().spec().unwrap();
        let model = SyntheticModel::new(spec, Formats { layers, head: None });
        (model.program().clone(), Costs::new(model.program(), 2.0))
    }

    #[test]
    fn a_decoded_token_reads_every_weight_and_its_context() {
        let (program, costs) = costs("tinyllama-1.1b");
        let one = costs.step(1, 1, 100, 1);
        // 22 layers of 4 heads of 64, keys and values, f16
        let kv = 100.0 * 22.0 * 4.0 * 64.0 * 2.0 * 2.0;
        assert_eq!(one.bytes, program.bytes_per_token() as f64 + kv);
        let matrices = program.weights.iter().filter(|w| w.shape[0] > 1 && w.label != "embed");
        let weights: usize = matrices.map(|w| w.shape[0] * w.shape[1]).sum();
        assert_eq!(one.ops, 2.0 * weights as f64);
        let head = 2.0 * 32_000.0 * 2048.0;
        assert_eq!(one.int_ops, one.ops - head, "the head is f16");
        let row = FloatType::F16.bytes() as f64 * 2048.0;
        let eight = costs.step(2, 4, 100, 8);
        assert_eq!(eight.bytes, one.bytes + kv + 7.0 * row, "weights once, contexts twice");
        assert_eq!(eight.ops, 8.0 * one.ops);
        let none = costs.step(1, 1, 100, 0);
        assert_eq!((none.bytes, none.ops), (one.bytes - head, one.ops - head), "no head");
    }

    #[test]
    fn a_window_bounds_what_is_read() {
        let (mut program, _) = costs("tinyllama-1.1b");
        for step in &mut program.steps {
            if let Op::Attend { mask, .. } = &mut step.op {
                *mask = Mask::Window(64);
            }
        }
        let costs = Costs::new(&program, 2.0);
        let bytes = |rows, context| costs.step(1, rows, context, 1).bytes;
        assert_eq!(bytes(1, 64), bytes(1, 4096));
        assert!(bytes(1, 63) < bytes(1, 64));
        let position = 22.0 * 4.0 * 64.0 * 2.0 * 2.0;
        assert_eq!(bytes(4, 4096), bytes(1, 4096) + 3.0 * position + 3.0 * 4096.0);
    }
}
