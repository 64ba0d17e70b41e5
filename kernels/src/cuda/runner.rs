//! The CUDA runner: takes all memory at build, then writes a step's arrays, launches and reads logits.
//!
//! Not here: which kernels run ([`super::plan`]), what a device is ([`super::gpu`]).

use super::estimate;
use super::gpu::{Gpu, Pointer, Recorded};
use super::inputs::{self, Inputs};
use super::plan::{self, Activations, COUNTERS, Choices, Chosen, Plan, Scratch, ScratchBytes};
use super::store::{self, Stored};
use crate::backend::{ASKED_ROWS, RowCounts, RunnerMemory};
use crate::program::{KvDecl, Program, SlotId, TokenId};
use crate::{
    Draw, Error, Runner, StepInput, StepLimits, StepOutput, WeightSource, memory, validate,
};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// A program with its weights and memory on a device.
pub(crate) struct CudaRunner {
    gpu: Box<dyn Gpu>,
    program: Program,
    limits: StepLimits,
    plan: Plan,
    memory: RunnerMemory,
    /// Launches by the rows they are made for, and which tokens they choose.
    launches: HashMap<([usize; 2], Chosen), Recorded>,
    /// The step's arrays, and speeds of its tokens.
    words: Vec<u32>,
    speeds: Vec<f32>,
    /// Rows of the last step.
    counts: RowCounts,
    /// Rows of the steps that were asked for and whose tokens are kept on the device.
    kept: usize,
    /// Whether the last step was asked for, so that its own tokens are wanted too.
    asked: bool,
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
        estimate::check(gpu.as_mut(), program, limits)?;
        let stored = store::load(gpu.as_mut(), program, weights, limits.trace)?;
        let (plan, memory) = take(gpu.as_mut(), program, limits, stored)?;
        Ok(Self {
            gpu,
            program: program.clone(),
            limits: *limits,
            plan,
            memory,
            launches: HashMap::new(),
            words: vec![],
            speeds: vec![],
            counts: RowCounts::default(),
            kept: 0,
            asked: false,
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

    /// Asks for the launches of the step whose arrays were written.
    fn run(&mut self, chosen: Chosen) -> Result<(), Error> {
        let tokens = bucket(self.counts.tokens, self.limits.tokens);
        let outputs = bucket(self.counts.outputs, self.limits.outputs);
        let rows = RowCounts { tokens, outputs };
        let recorded = match self.launches.entry(([tokens, outputs], chosen)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let launches = self.plan.launches(&self.program, rows, chosen);
                new.insert(self.gpu.record(launches)?)
            }
        };
        self.gpu.replay(recorded)
    }

    /// Reads `rows` chosen tokens, none where the device is not certain.
    fn read_chosen(
        &mut self,
        from: Pointer,
        rows: usize,
        out: &mut Vec<Option<TokenId>>,
    ) -> Result<(), Error> {
        self.words.clear();
        self.words.resize(2 * rows, 0);
        self.gpu.read(from, bytemuck::cast_slice_mut(&mut self.words))?;
        let pairs = self.words.chunks_exact(2);
        out.extend(pairs.map(|pair| (pair[1] == 1).then_some(TokenId(pair[0]))));
        Ok(())
    }

    /// The tokens that the device chose in the rows that have a draw.
    fn choices(
        &mut self,
        draws: &[Option<Draw>],
        out: &mut Vec<Option<TokenId>>,
    ) -> Result<(), Error> {
        out.clear();
        if chosen(draws) == Chosen::Nothing {
            return Ok(());
        }
        self.read_chosen(self.plan.choices.chosen, draws.len(), out)?;
        out.iter_mut()
            .zip(draws)
            .for_each(|(token, draw)| *token = token.filter(|_| draw.is_some()));
        Ok(())
    }

    /// Checks a step that is asked for: it needs room for its own tokens and those it follows.
    fn check_asked(&self, input: &StepInput<'_>, follows: bool) -> Result<(), Error> {
        validate::input(&self.program, &self.limits, input)?;
        // A new chain keeps nothing of the step before it.
        let before = if follows { self.counts.outputs } else { 0 };
        let rows = input.output_rows.len();
        let reason = if follows && input.tokens.len() != before {
            format!(
                "expected {before} tokens that follow {before} rows, found {}",
                input.tokens.len()
            )
        } else if input.draws.len() != rows || input.draws.contains(&None) {
            format!("expected draws for all {rows} rows of a step that is asked for")
        } else if self.kept + before + rows > ASKED_ROWS {
            format!("expected at most {ASKED_ROWS} rows before their tokens are asked for")
        } else {
            return Ok(());
        };
        Err(Error::Input { reason })
    }

    /// Reads the rows of logits that have no chosen token; others stay as they were.
    fn logits(&mut self, output: &mut StepOutput) -> Result<(), Error> {
        let logits = self.program.logits;
        let (width, from) =
            (self.program.slots[logits.index()].width, self.plan.slots[logits.index()]);
        output.logits.resize(self.counts.outputs * width, 0.0);
        let is_chosen = |row: usize| output.chosen.get(row).is_some_and(Option::is_some);
        let mut row = 0;
        while row < self.counts.outputs {
            let same = |other: &usize| is_chosen(*other) == is_chosen(row);
            let end = row + (row..self.counts.outputs).take_while(same).count();
            if !is_chosen(row) {
                let rows = &mut output.logits[row * width..end * width];
                self.gpu.read(from.offset(4 * row * width), bytemuck::cast_slice_mut(rows))?;
            }
            row = end;
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

/// Takes all memory but that of the weights, which were stored in so many bytes.
///
/// # Errors
/// Want of memory, and ops that have no kernel.
pub(super) fn take(
    gpu: &mut dyn Gpu,
    program: &Program,
    limits: &StepLimits,
    (weights, weights_bytes): (Vec<Stored>, usize),
) -> Result<(Plan, RunnerMemory), Error> {
    let mut build = Build { gpu, program, limits, slots_bytes: 0, kv_bytes: 0 };
    let plan = build.plan(weights)?;
    let Build { slots_bytes, kv_bytes, .. } = build;
    Ok((plan, RunnerMemory { weights_bytes, slots_bytes, kv_bytes }))
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
        let layout = memory::plan(program, limits, |width| width);
        let bytes = plan::scratch_bytes(program, &weights, limits)?;
        let arena = self.take(4 * layout.len)?;
        let inputs = self.take(4 * Inputs::len_max(program, limits))?;
        let scratch = Scratch {
            quantized: [self.activations(bytes)?, self.activations(bytes)?],
            halves: self.take(bytes.halves)?,
            half_scales: self.take(bytes.half_scales)?,
            range_sums: self.take(bytes.range_sums)?,
            parts: self.take(bytes.parts)?,
            counters: self.take(4 * COUNTERS)?,
        };
        let vocab = program.slots[program.logits.index()].width;
        let choices = Choices {
            parts: self.take(plan::choice_bytes(vocab, limits.outputs))?,
            counters: self.take(4 * limits.outputs)?,
            chosen: self.take(8 * limits.outputs)?,
            kept: self.take(8 * ASKED_ROWS)?,
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
            choices,
            trace: limits.trace,
            multiprocessors: self.gpu.multiprocessors(),
            block_len: limits.block_len,
            splits: plan::splits(limits),
        })
    }

    fn activations(&mut self, bytes: ScratchBytes) -> Result<Activations, Error> {
        Ok(Activations { quads: self.take(bytes.quads)?, scales: self.take(bytes.scales)? })
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

/// Which tokens a step with these draws chooses.
fn chosen(draws: &[Option<Draw>]) -> Chosen {
    let each = draws.iter().flatten();
    let kind = |draw: &Draw| {
        if draw.temperature == 0.0 { Chosen::Greatest } else { Chosen::Drawn }
    };
    each.map(kind).max().unwrap_or(Chosen::Nothing)
}

/// Rows that launches are made for, so that few kinds of steps have launches of their own: up to 16
/// as many as there are, else the next power of two.
fn bucket(rows: usize, most: usize) -> usize {
    if rows <= 16 { rows } else { rows.next_power_of_two().min(most) }
}

impl Runner for CudaRunner {
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
        validate::input(&self.program, &self.limits, input)?;
        (self.kept, self.asked) = (0, false);
        self.counts = RowCounts::new(input);
        self.write_inputs(input)?;
        self.run(chosen(input.draws))?;
        self.choices(input.draws, &mut output.chosen)?;
        self.logits(output)
    }

    fn ask(&mut self, input: &StepInput<'_>, follows: bool) -> Result<bool, Error> {
        if !follows {
            self.kept = 0;
        }
        self.check_asked(input, follows)?;
        self.write_inputs(input)?;
        if follows {
            let rows = self.counts.outputs;
            self.gpu.launch(&self.plan.follow(rows, self.kept))?;
            self.kept += rows;
        }
        (self.counts, self.asked) = (RowCounts::new(input), true);
        self.run(chosen(input.draws))?;
        Ok(true)
    }

    fn answers(&mut self, out: &mut Vec<Option<TokenId>>) -> Result<(), Error> {
        out.clear();
        if !std::mem::take(&mut self.asked) {
            return Ok(());
        }
        let (kept, rows) = (std::mem::take(&mut self.kept), self.counts.outputs);
        self.gpu.launch(&self.plan.follow(rows, kept))?;
        self.read_chosen(self.plan.choices.kept, kept + rows, out)
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
