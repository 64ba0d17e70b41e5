//! The CPU runner: owns weights, buffers and the team, and runs the plan step by step.
//!
//! After build nothing is allocated on the step path, except speeds of length-dependent rotary
//! tables and, the first time, the caller's logits. Not here: phases ([`super::exec`]).

use super::exec::{Buffers, Exec};
use super::isa::Machine;
use super::kv::KvCache;
use super::pages::Arena;
use super::plan::Plan;
use super::quantize::BlockScale;
use super::share::Shared;
use super::store::Stored;
use super::team::Team;
use crate::backend::{RowCounts, RunnerMemory};
use crate::program::{Program, SlotId};
use crate::{Error, Runner, StepInput, StepLimits, StepOutput, validate};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

/// A program with its weights and memory, run by a team of threads.
#[derive(Debug)]
pub(crate) struct CpuRunner {
    machine: Machine,
    team: Arc<Team>,
    program: Program,
    limits: StepLimits,
    plan: Plan,
    weights: Vec<Stored>,
    buffers: Buffers,
    /// Of each phase, how many of its items are taken.
    claimed: Vec<AtomicUsize>,
    /// Rows of the last step.
    counts: RowCounts,
}

impl CpuRunner {
    /// Takes all memory for a validated program with its weights.
    ///
    /// # Errors
    /// [`Error::Device`] if the system has no such memory left.
    pub(crate) fn new(
        (machine, team): (Machine, Arc<Team>),
        program: &Program,
        weights: Vec<Stored>,
        limits: &StepLimits,
    ) -> Result<Self, Error> {
        let (plan, arena) = (Plan::new(program, &weights, limits), Arena::default());
        let kv = |decl| KvCache::new(&arena, decl, (limits.blocks, limits.block_len));
        let buffers = Buffers {
            slots: Shared::new(&arena, plan.arena)?,
            gates: Shared::new(&arena, plan.gate_room * team.threads())?,
            ropes: Shared::new(&arena, plan.rope_len)?,
            quads: Shared::new(&arena, plan.quads)?,
            scales: Shared::new(&arena, plan.blocks)?,
            kv: program.kv.iter().map(kv).collect::<Result<_, _>>()?,
        };
        let claimed = plan.phases.iter().map(|_| AtomicUsize::new(0)).collect();
        Ok(Self {
            machine,
            team,
            program: program.clone(),
            limits: *limits,
            plan,
            weights,
            buffers,
            claimed,
            counts: RowCounts::default(),
        })
    }

    /// Appends the rows of a slot as the last step left them.
    fn copy(&mut self, slot: SlotId, out: &mut Vec<f32>) {
        let place = self.plan.place(slot, self.counts);
        let all = self.buffers.slots.all_mut();
        for row in 0..place.rows {
            out.extend_from_slice(&all[place.offset + row * place.stride..][..place.width]);
        }
    }
}

impl Runner for CpuRunner {
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
        validate::input(&self.program, &self.limits, input)?;
        self.counts = RowCounts::new(input);
        self.claimed.iter_mut().for_each(|claimed| *claimed.get_mut() = 0);
        self.team.run(|member| {
            let exec = Exec {
                machine: self.machine,
                program: &self.program,
                plan: &self.plan,
                weights: &self.weights,
                buffers: &self.buffers,
                input,
                counts: self.counts,
                member,
                claimed: &self.claimed,
            };
            exec.run();
        });
        output.chosen.clear();
        output.logits.clear();
        self.copy(self.program.logits, &mut output.logits);
        Ok(())
    }

    fn read_slot(&mut self, slot: SlotId, out: &mut Vec<f32>) -> Result<(), Error> {
        validate::traced(&self.program, &self.limits, slot)?;
        out.clear();
        self.copy(slot, out);
        Ok(())
    }

    fn memory(&self) -> RunnerMemory {
        let Buffers { slots, gates, ropes, quads, scales, kv } = &self.buffers;
        let int8 = quads.bytes() + scales.bytes();
        RunnerMemory {
            weights_bytes: self.weights.iter().map(Stored::bytes).sum(),
            slots_bytes: slots.bytes() + gates.bytes() + ropes.bytes() + int8,
            kv_bytes: kv.iter().map(KvCache::bytes).sum(),
        }
    }

    fn poison(&mut self, live: &[usize]) {
        self.buffers.kv.iter_mut().for_each(|kv| kv.poison(live));
        self.buffers.slots.all_mut().fill(f32::NAN);
        self.buffers.gates.all_mut().fill(f32::NAN);
        self.buffers.ropes.all_mut().fill(f32::NAN);
        self.buffers.scales.all_mut().fill(BlockScale { scale: f32::NAN, sum: 0 });
    }
}
