//! Checks a lowered program: declarations, then every step's ids, shapes, row kinds and liveness.
//!
//! Liveness is per column: a step may read only columns that an earlier step has written. An op
//! never writes the slot it reads unless the op is defined in place, so a backend may hold the
//! two apart.
//!
//! Not here: step inputs ([`super::input`]), weights' values.

use crate::program::{
    Heads, KvDecl, KvLayer, Mask, Op, RopeDecl, RopeId, RopeSpeeds, Rows, SlotDecl, SlotId,
    SlotView, WeightDecl, WeightId,
};
use crate::{Error, Program};
use quant::{Bits, Format};
use std::collections::HashSet;

/// A rule that is broken, with what was expected and found.
type Broken = String;

/// Checks every rule of the contract that does not depend on a step's input.
///
/// # Errors
/// [`Error::Declaration`] or [`Error::Program`] naming the first broken rule.
pub fn program(program: &Program) -> Result<(), Error> {
    declarations(program)?;
    let mut check = Check::new(program);
    for (i, step) in program.steps.iter().enumerate() {
        check.step(&step.op).map_err(|reason| Error::Program {
            step: i,
            label: step.label.clone(),
            reason,
        })?;
    }
    check.logits().map_err(|reason| declaration("logits", reason))
}

fn declaration(name: &str, reason: Broken) -> Error {
    Error::Declaration { declaration: name.to_owned(), reason }
}

fn require(holds: bool, broken: impl FnOnce() -> Broken) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err(broken()) }
}

fn declarations(program: &Program) -> Result<(), Error> {
    let mut labels = HashSet::new();
    for decl in &program.weights {
        let name = format!("weight {}", decl.label);
        unique(&mut labels, &decl.label)
            .and_then(|()| weight_decl(decl))
            .map_err(|reason| declaration(&name, reason))?;
    }
    labels.clear();
    for decl in &program.slots {
        let name = format!("slot {}", decl.label);
        unique(&mut labels, &decl.label)
            .and_then(|()| require(decl.width > 0, || "width is 0".to_owned()))
            .map_err(|reason| declaration(&name, reason))?;
    }
    for (i, decl) in program.ropes.iter().enumerate() {
        rope_decl(decl).map_err(|reason| declaration(&format!("rope {i}"), reason))?;
    }
    for (i, decl) in program.kv.iter().enumerate() {
        kv_decl(*decl).map_err(|reason| declaration(&format!("kv layer {i}"), reason))?;
    }
    Ok(())
}

fn unique<'a>(seen: &mut HashSet<&'a str>, label: &'a str) -> Result<(), Broken> {
    require(!label.is_empty(), || "label is empty".to_owned())?;
    require(seen.insert(label), || "label is declared twice".to_owned())
}

fn weight_decl(decl: &WeightDecl) -> Result<(), Broken> {
    let [n, k] = decl.shape;
    let countable = n.checked_mul(k).is_some_and(|all| all > 0);
    require(countable, || format!("expected a shape [n, k] above zero, found [{n}, {k}]"))?;
    if let Format::Grouped { bits, group, act_order: _ } = decl.format {
        require(group > 0 && k.is_multiple_of(group), || {
            format!("expected groups that divide {k} columns, found groups of {group}")
        })?;
        require(bits == Bits::Eight || k.is_multiple_of(2), || {
            format!("expected an even number of 4-bit columns, found {k}")
        })?;
    }
    Ok(())
}

fn rope_decl(decl: &RopeDecl) -> Result<(), Broken> {
    let width = decl.width;
    require(width > 0 && width.is_multiple_of(2), || {
        format!("expected an even width, found {width}")
    })?;
    require(decl.amplitude.is_finite(), || format!("amplitude is {}", decl.amplitude))?;
    match &decl.speeds {
        RopeSpeeds::Fixed(speeds) => rope_table("speeds", speeds, width),
        RopeSpeeds::Switched { short, long, switch: _ } => {
            rope_table("short speeds", short, width)?;
            rope_table("long speeds", long, width)
        }
        RopeSpeeds::DynamicNtk { theta, factor, trained } => {
            let positive = |x: f32| x.is_finite() && x > 0.0;
            require(width > 2, || format!("expected an ntk width above 2, found {width}"))?;
            require(positive(*theta), || format!("expected theta above zero, found {theta}"))?;
            require(positive(*factor), || format!("expected a factor above zero, found {factor}"))?;
            require(*trained > 0, || "expected a trained length above zero, found 0".to_owned())
        }
    }
}

fn rope_table(name: &str, speeds: &[f32], width: usize) -> Result<(), Broken> {
    let (expected, found) = (width / 2, speeds.len());
    require(found == expected, || format!("expected {expected} {name}, found {found}"))?;
    require(speeds.iter().all(|s| s.is_finite()), || format!("{name} hold a non-finite value"))
}

fn kv_decl(decl: KvDecl) -> Result<(), Broken> {
    let KvDecl { heads, head_width } = decl;
    require(heads > 0 && head_width > 0, || {
        format!("expected heads and width above zero, found {heads} of {head_width}")
    })
}

/// Walks the steps and remembers what has been written so far.
struct Check<'p> {
    program: &'p Program,
    /// Written columns of every slot.
    written: Vec<Vec<bool>>,
    /// Written KV layers.
    kv_written: Vec<bool>,
}

impl<'p> Check<'p> {
    fn new(program: &'p Program) -> Self {
        let written = program.slots.iter().map(|slot| vec![false; slot.width]).collect();
        Self { program, written, kv_written: vec![false; program.kv.len()] }
    }

    fn step(&mut self, op: &Op) -> Result<(), Broken> {
        match *op {
            Op::Embed { table, out } => self.embed(table, out),
            Op::Norm { x, add, weight, eps, out } => self.norm(x, add, weight, eps, out),
            Op::Linear { x, weight, bias, out } => self.linear(x, weight, bias, out),
            Op::HeadNorm { heads, weight, eps } => self.head_norm(heads, weight, eps),
            Op::Rope { heads, rope } => self.rope(heads, rope),
            Op::KvWrite { layer, k, v } => self.kv_write(layer, k, v),
            Op::Attend { q, layer, mask, scale, out } => {
                mask_and_scale(mask, scale)?;
                self.attend(q, layer, out)
            }
            Op::Activate { kind: _, x, out } => self.activate(x, out),
            Op::Gather { x, out } => self.gather(x, out),
        }
    }

    fn embed(&mut self, table: WeightId, out: SlotId) -> Result<(), Broken> {
        let [_, d] = self.weight(table)?.shape;
        let decl = self.token_slot(out)?;
        same_width("of table rows", d, &decl.label, decl.width)?;
        self.write(self.whole(out)?)
    }

    fn norm(
        &mut self,
        x: SlotId,
        add: Option<SlotId>,
        weight: WeightId,
        eps: f32,
        out: SlotId,
    ) -> Result<(), Broken> {
        let d = self.token_slot(x)?.width;
        self.vector(weight, d)?;
        check_eps(eps)?;
        for input in [x].into_iter().chain(add) {
            let decl = self.token_slot(input)?;
            same_width("of x", d, &decl.label, decl.width)?;
            self.apart(input, out)?;
            self.read(self.whole(input)?)?;
        }
        require(add != Some(x), || "add is the same slot as x".to_owned())?;
        let decl = self.token_slot(out)?;
        same_width("of x", d, &decl.label, decl.width)?;
        self.write(self.whole(out)?)
    }

    fn linear(
        &mut self,
        x: SlotId,
        weight: WeightId,
        bias: Option<WeightId>,
        out: SlotView,
    ) -> Result<(), Broken> {
        self.read(self.whole(x)?)?;
        let [n, k] = self.weight(weight)?.shape;
        let (x_decl, out_decl) = (self.slot(x)?, self.slot(out.slot)?);
        same_width("of weight rows", k, &x_decl.label, x_decl.width)?;
        same_width("of the output", n, &out_decl.label, out.width)?;
        require(x_decl.rows == out_decl.rows, || {
            format!("expected {:?} rows in slot {} as in x", x_decl.rows, out_decl.label)
        })?;
        self.apart(x, out.slot)?;
        bias.map_or(Ok(()), |bias| self.vector(bias, n))?;
        self.write(out)
    }

    fn head_norm(&mut self, heads: Heads, weight: WeightId, eps: f32) -> Result<(), Broken> {
        self.read_heads(heads)?;
        check_eps(eps)?;
        self.vector(weight, heads.width)
    }

    fn rope(&mut self, heads: Heads, rope: RopeId) -> Result<(), Broken> {
        self.read_heads(heads)?;
        let decl = declared("rope", &self.program.ropes, rope.index())?;
        require(decl.width <= heads.width, || {
            format!("expected a rope width up to {}, found {}", heads.width, decl.width)
        })
    }

    fn kv_write(&mut self, layer: KvLayer, k: Heads, v: Heads) -> Result<(), Broken> {
        let decl = *declared("kv layer", &self.program.kv, layer.index())?;
        for heads in [k, v] {
            self.read_heads(heads)?;
            let found = (heads.count, heads.width);
            require(found == (decl.heads, decl.head_width), || {
                format!(
                    "expected {} heads of {}, found {} of {}",
                    decl.heads, decl.head_width, heads.count, heads.width
                )
            })?;
        }
        let again = std::mem::replace(&mut self.kv_written[layer.index()], true);
        require(!again, || format!("kv layer {} is written twice", layer.0))
    }

    fn attend(&mut self, q: Heads, layer: KvLayer, out: SlotId) -> Result<(), Broken> {
        self.read_heads(q)?;
        let decl = *declared("kv layer", &self.program.kv, layer.index())?;
        require(self.kv_written[layer.index()], || {
            format!("kv layer {} is read before it is written", layer.0)
        })?;
        require(q.width == decl.head_width, || {
            format!("expected query heads of {}, found {}", decl.head_width, q.width)
        })?;
        require(q.count.is_multiple_of(decl.heads), || {
            format!("expected query heads in multiples of {}, found {}", decl.heads, q.count)
        })?;
        let out_decl = self.token_slot(out)?;
        same_width("of all query heads", q.view().width, &out_decl.label, out_decl.width)?;
        self.apart(q.slot, out)?;
        self.write(self.whole(out)?)
    }

    fn activate(&mut self, x: SlotId, out: SlotId) -> Result<(), Broken> {
        self.read(self.whole(x)?)?;
        let (x_decl, out_decl) = (self.token_slot(x)?, self.token_slot(out)?);
        let twice = out_decl.width.saturating_mul(2);
        same_width("of gate and up", twice, &x_decl.label, x_decl.width)?;
        self.apart(x, out)?;
        self.write(self.whole(out)?)
    }

    fn gather(&mut self, x: SlotId, out: SlotId) -> Result<(), Broken> {
        self.read(self.whole(x)?)?;
        let (x_decl, out_decl) = (self.token_slot(x)?, self.slot(out)?);
        same_width("of x", x_decl.width, &out_decl.label, out_decl.width)?;
        require(out_decl.rows == Rows::Outputs, || {
            format!("expected Outputs rows in slot {}, found Tokens", out_decl.label)
        })?;
        self.write(self.whole(out)?)
    }

    fn logits(&self) -> Result<(), Broken> {
        let decl = self.slot(self.program.logits)?;
        require(decl.rows == Rows::Outputs, || {
            format!("expected Outputs rows in slot {}, found Tokens", decl.label)
        })?;
        let last = self.program.steps.last().map(|step| step.op.writes());
        require(last.is_some_and(|slots| slots.contains(&self.program.logits)), || {
            format!("slot {} is not written by the last step", decl.label)
        })?;
        self.read(self.whole(self.program.logits)?)
    }

    fn slot(&self, id: SlotId) -> Result<&'p SlotDecl, Broken> {
        declared("slot", &self.program.slots, id.index())
    }

    fn weight(&self, id: WeightId) -> Result<&'p WeightDecl, Broken> {
        declared("weight", &self.program.weights, id.index())
    }

    /// A slot that must have token rows.
    fn token_slot(&self, id: SlotId) -> Result<&'p SlotDecl, Broken> {
        let decl = self.slot(id)?;
        require(decl.rows == Rows::Tokens, || {
            format!("expected Tokens rows in slot {}, found Outputs", decl.label)
        })?;
        Ok(decl)
    }

    /// A weight that must be a float vector `[1, width]`.
    fn vector(&self, id: WeightId, width: usize) -> Result<(), Broken> {
        let decl = self.weight(id)?;
        let dense = matches!(decl.format, Format::Dense(_));
        require(decl.shape == [1, width] && dense, || {
            let (shape, format) = (decl.shape, decl.format);
            format!(
                "expected weight {} as floats [1, {width}], found {format} {shape:?}",
                decl.label
            )
        })
    }

    fn whole(&self, slot: SlotId) -> Result<SlotView, Broken> {
        Ok(SlotView { slot, start: 0, width: self.slot(slot)?.width })
    }

    /// Refuses an output slot that is also an input.
    fn apart(&self, input: SlotId, output: SlotId) -> Result<(), Broken> {
        let label = &self.slot(output)?.label;
        require(input != output, || format!("slot {label} is both input and output"))
    }

    /// Heads that are read (and perhaps updated in place).
    fn read_heads(&self, heads: Heads) -> Result<(), Broken> {
        let label = &self.token_slot(heads.slot)?.label;
        let Heads { count, width, .. } = heads;
        let countable = count.checked_mul(width).is_some_and(|all| all > 0);
        require(countable, || format!("expected heads in slot {label}, found {count} of {width}"))?;
        self.read(heads.view())
    }

    fn columns(&self, view: SlotView) -> Result<std::ops::Range<usize>, Broken> {
        let decl = self.slot(view.slot)?;
        let end = view.start.checked_add(view.width).filter(|end| *end <= decl.width);
        let SlotView { start, width, .. } = view;
        end.map(|end| start..end).ok_or_else(|| {
            let label = &decl.label;
            format!("{width} columns from {start} exceed slot {label} of width {}", decl.width)
        })
    }

    fn read(&self, view: SlotView) -> Result<(), Broken> {
        let columns = self.columns(view)?;
        let start = columns.start;
        let unwritten = self.written[view.slot.index()][columns].iter().position(|done| !done);
        let label = &self.slot(view.slot)?.label;
        unwritten.map_or(Ok(()), |i| {
            Err(format!("column {} of slot {label} is read before it is written", start + i))
        })
    }

    fn write(&mut self, view: SlotView) -> Result<(), Broken> {
        let columns = self.columns(view)?;
        self.written[view.slot.index()][columns].fill(true);
        Ok(())
    }
}

fn declared<'a, T>(kind: &str, all: &'a [T], index: usize) -> Result<&'a T, Broken> {
    all.get(index).ok_or_else(|| format!("expected {kind} ids below {}, found {index}", all.len()))
}

fn same_width(what: &str, expected: usize, label: &str, found: usize) -> Result<(), Broken> {
    require(expected == found, || {
        format!("expected width {expected} {what}, found {found} in slot {label}")
    })
}

fn check_eps(eps: f32) -> Result<(), Broken> {
    require(eps.is_finite() && eps >= 0.0, || format!("expected eps of at least 0, found {eps}"))
}

fn mask_and_scale(mask: Mask, scale: f32) -> Result<(), Broken> {
    require(mask != Mask::Window(0), || "expected a window above 0, found 0".to_owned())?;
    require(scale.is_finite(), || format!("expected a finite scale, found {scale}"))
}

#[cfg(test)]
#[path = "program_tests.rs"]
mod tests;
