//! The CUDA runner: takes all memory at build, then writes a step's arrays, launches and reads logits.
//!
//! Not here: which kernels run ([`super::plan`]), what a device is ([`super::gpu`]).

use super::gpu::{Gpu, Pointer, Recorded};
use super::inputs::{self, Inputs};
use super::plan::{self, COUNTERS, Plan, Scratch};
use super::store::{self, Stored};
use crate::backend::{RowCounts, RunnerMemory};
use crate::program::{KvDecl, Program, SlotId};
use crate::{Error, Runner, StepInput, StepLimits, StepOutput, WeightSource, memory, validate};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// A program with its weights and memory on a device.
pub(crate) struct CudaRunner {
    gpu: Box<dyn Gpu>,
    program: Program,
    limits: StepLimits,
    plan: Plan,
    memory: RunnerMemory,
    /// Launches by the rows they are made for.
    launches: HashMap<[usize; 2], Recorded>,
    /// The step's arrays, and speeds of its tokens.
    words: Vec<u32>,
    speeds: Vec<f32>,
    /// Rows of the last step.
    counts: RowCounts,
}

impl CudaRunner {
    /// Loads the weights of a validated program and takes all memory.
    ///
    /// # Errors
    /// Those of the source, want of memory, and ops that have no kernel.
    pub(crate) fn new(
        mut gpu: Box<dyn Gpu>,
        program: &Program,
        weights: &dyn WeightSource,
        limits: &StepLimits,
    ) -> Result<Self, Error> {
        let (weights, weights_bytes) = store::load(gpu.as_mut(), program, weights)?;
        let mut build = Build { gpu: gpu.as_mut(), program, limits, slots_bytes: 0, kv_bytes: 0 };
        let plan = build.plan(weights)?;
        let Build { slots_bytes, kv_bytes, .. } = build;
        Ok(Self {
            gpu,
            program: program.clone(),
            limits: *limits,
            plan,
            memory: RunnerMemory { weights_bytes, slots_bytes, kv_bytes },
            launches: HashMap::new(),
            words: vec![],
            speeds: vec![],
            counts: RowCounts::default(),
        })
    }

    /// Writes what kernels read of a step.
    fn write_inputs(&mut self, input: &StepInput<'_>) -> Result<(), Error> {
        let inputs = &self.plan.inputs;
        inputs.pack(&self.program, input, &mut self.words);
        self.gpu.write(inputs.counts(), bytemuck::cast_slice(&self.words))?;
        for (decl, to) in self.program.ropes.iter().zip(&self.plan.speeds) {
            if inputs::fixed_speeds(decl).is_none() {
                inputs::token_speeds(decl, input, &mut self.speeds);
                self.gpu.write(*to, bytemuck::cast_slice(&self.speeds))?;
            }
        }
        Ok(())
    }

    /// Appends the rows of a slot as the last step left them.
    fn copy(&mut self, slot: SlotId, out: &mut Vec<f32>) -> Result<(), Error> {
        let decl = &self.program.slots[slot.index()];
        let start = out.len();
        out.resize(start + self.counts.of(decl.rows) * decl.width, 0.0);
        self.gpu.read(self.plan.slots[slot.index()], bytemuck::cast_slice_mut(&mut out[start..]))
    }

    /// Fills the dead positions of each block of a layer with NaN.
    fn poison_kv(&mut self, layer: usize, live: &[usize]) -> Result<(), Error> {
        const NAN: u16 = 0x7e00;
        let (KvDecl { heads, head_width }, block_len) =
            (self.program.kv[layer], self.limits.block_len);
        let nans = vec![NAN; block_len * head_width];
        for block in 0..self.limits.blocks {
            let kept = live.get(block).copied().unwrap_or(0).min(block_len);
            for head in 0..heads {
                let row = (block * heads + head) * block_len + kept;
                let dead = bytemuck::cast_slice(&nans[kept * head_width..]);
                for cache in self.plan.kv[layer] {
                    self.gpu.write(cache.offset(2 * row * head_width), dead)?;
                }
            }
        }
        Ok(())
    }

    fn poison_slots(&mut self) -> Result<(), Error> {
        let most = RowCounts::most(&self.limits);
        for (decl, at) in self.program.slots.iter().zip(&self.plan.slots) {
            let nans = vec![f32::NAN; most.of(decl.rows) * decl.width];
            self.gpu.write(*at, bytemuck::cast_slice(&nans))?;
        }
        Ok(())
    }
}

/// Takes the memory of a runner.
struct Build<'a> {
    gpu: &'a mut dyn Gpu,
    program: &'a Program,
    limits: &'a StepLimits,
    slots_bytes: usize,
    kv_bytes: usize,
}

impl Build<'_> {
    fn plan(&mut self, weights: Vec<Stored>) -> Result<Plan, Error> {
        let (program, limits) = (self.program, self.limits);
        let layout = memory::plan(program, limits);
        let bytes = plan::scratch_bytes(program, &weights, limits)?;
        let arena = self.take(4 * layout.len)?;
        let inputs = self.take(4 * Inputs::len_max(program, limits))?;
        let scratch = Scratch {
            quads: self.take(bytes.quads)?,
            scales: self.take(bytes.scales)?,
            halves: self.take(bytes.halves)?,
            half_scales: self.take(bytes.half_scales)?,
            range_sums: self.take(bytes.range_sums)?,
            parts: self.take(bytes.parts)?,
            counters: self.take(4 * COUNTERS)?,
        };
        let speeds = program.ropes.iter().map(|decl| {
            let fixed = inputs::fixed_speeds(decl);
            let len = fixed.as_ref().map_or(limits.tokens * decl.width / 2, Vec::len);
            let at = self.take(4 * len)?;
            fixed.map_or(Ok(()), |speeds| self.gpu.write(at, bytemuck::cast_slice(&speeds)))?;
            Ok(at)
        });
        let speeds = speeds.collect::<Result<_, Error>>()?;
        let kv = program.kv.iter().map(|decl| self.cache(decl)).collect::<Result<_, Error>>()?;
        Ok(Plan {
            inputs: Inputs::new(inputs, program, limits),
            slots: layout.offsets.iter().map(|offset| arena.offset(4 * offset)).collect(),
            weights,
            kv,
            speeds,
            scratch,
            block_len: limits.block_len,
            splits: plan::splits(limits),
        })
    }

    fn take(&mut self, bytes: usize) -> Result<Pointer, Error> {
        self.slots_bytes += bytes;
        self.gpu.alloc(bytes)
    }

    /// Keys and values of a layer.
    fn cache(&mut self, decl: &KvDecl) -> Result<[Pointer; 2], Error> {
        let positions = self.limits.blocks * self.limits.block_len;
        let bytes = 2 * positions * decl.heads * decl.head_width;
        self.kv_bytes += 2 * bytes;
        Ok([self.gpu.alloc(bytes)?, self.gpu.alloc(bytes)?])
    }
}

/// Rows that launches are made for, so that few kinds of steps have launches of their own: up to 16
/// as many as there are, else the next power of two.
fn bucket(rows: usize, most: usize) -> usize {
    if rows <= 16 { rows } else { rows.next_power_of_two().min(most) }
}

impl Runner for CudaRunner {
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
        validate::input(&self.program, &self.limits, input)?;
        self.counts = RowCounts::new(input);
        self.write_inputs(input)?;
        let tokens = bucket(self.counts.tokens, self.limits.tokens);
        let outputs = bucket(self.counts.outputs, self.limits.outputs);
        let rows = RowCounts { tokens, outputs };
        let recorded = match self.launches.entry([tokens, outputs]) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                new.insert(self.gpu.record(self.plan.launches(&self.program, rows))?)
            }
        };
        self.gpu.replay(recorded)?;
        output.logits.clear();
        self.copy(self.program.logits, &mut output.logits)
    }

    fn read_slot(&mut self, slot: SlotId, out: &mut Vec<f32>) -> Result<(), Error> {
        validate::traced(&self.program, &self.limits, slot)?;
        out.clear();
        self.copy(slot, out)
    }

    fn memory(&self) -> RunnerMemory {
        self.memory
    }

    fn poison(&mut self, live: &[usize]) {
        let mut layers = 0..self.program.kv.len();
        let done = layers.try_for_each(|layer| self.poison_kv(layer, live));
        // A device that fails here fails the next step, which says so.
        let _ = done.and_then(|()| self.poison_slots());
    }
}
