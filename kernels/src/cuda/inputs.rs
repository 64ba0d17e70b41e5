//! The arrays of a step as kernels read them: one piece of device memory, written once a step.
//!
//! ```text
//! counts [2]         tokens, output rows
//! tokens, positions, sequences [t]    output_rows [r]    table_starts [s]
//! draws [r, 4]       kind of choice (0 none, 1 greatest, 2 drawn), temperature, key
//! speed_rows [t] of each rotary table
//! table              block tables of all sequences, one after another; last, since it grows
//! ```
//! Not here: what reads them ([`super::plan`]). Input: a validated [`StepInput`].

use super::gpu::Pointer;
use crate::program::{Program, RopeDecl, RopeSpeeds};
use crate::reference::rope;
use crate::{Draw, StepInput, StepLimits};

/// Where each array lies, in elements of 4 bytes.
#[derive(Debug, Clone)]
pub(crate) struct Inputs {
    at: Pointer,
    tokens: usize,
    outputs: usize,
    sequences: usize,
    ropes: usize,
}

/// Elements before the first array.
const HEADER: usize = 16;
/// Elements of a draw.
const DRAW: usize = 4;

impl Inputs {
    /// Elements that a step of these limits takes at most.
    pub(crate) fn len_max(program: &Program, limits: &StepLimits) -> usize {
        let tables = limits.sequences.saturating_mul(limits.blocks);
        Self::new(Pointer::NULL, program, limits).table_start() + tables
    }

    /// Lays the arrays out from `at` on.
    pub(crate) fn new(at: Pointer, program: &Program, limits: &StepLimits) -> Self {
        let StepLimits { tokens, outputs, sequences, .. } = *limits;
        Self { at, tokens, outputs, sequences, ropes: program.ropes.len() }
    }

    fn pointer(&self, element: usize) -> Pointer {
        self.at.offset(4 * element)
    }

    /// The number of tokens; the number of output rows follows it.
    pub(crate) fn counts(&self) -> Pointer {
        self.pointer(0)
    }

    /// The number of output rows.
    pub(crate) fn output_count(&self) -> Pointer {
        self.pointer(1)
    }

    pub(crate) fn token_ids(&self) -> Pointer {
        self.pointer(HEADER)
    }

    pub(crate) fn positions(&self) -> Pointer {
        self.pointer(HEADER + self.tokens)
    }

    /// Which sequence each token belongs to.
    pub(crate) fn owners(&self) -> Pointer {
        self.pointer(HEADER + 2 * self.tokens)
    }

    pub(crate) fn output_rows(&self) -> Pointer {
        self.pointer(self.outputs_start())
    }

    /// Where each sequence's block table begins in [`Inputs::table`].
    pub(crate) fn table_starts(&self) -> Pointer {
        self.pointer(self.outputs_start() + self.outputs)
    }

    /// How the token after each output row is chosen.
    pub(crate) fn draws(&self) -> Pointer {
        self.pointer(self.draws_start())
    }

    /// The row of each token in the speeds of rotary table `rope`.
    pub(crate) fn speed_rows(&self, rope: usize) -> Pointer {
        self.pointer(self.ropes_start() + rope * self.tokens)
    }

    pub(crate) fn table(&self) -> Pointer {
        self.pointer(self.table_start())
    }

    fn outputs_start(&self) -> usize {
        HEADER + 3 * self.tokens
    }

    fn draws_start(&self) -> usize {
        self.outputs_start() + self.outputs + self.sequences
    }

    fn ropes_start(&self) -> usize {
        self.draws_start() + DRAW * self.outputs
    }

    fn table_start(&self) -> usize {
        self.ropes_start() + self.ropes * self.tokens
    }

    /// Fills `words` with the arrays of a step.
    pub(crate) fn pack(&self, program: &Program, input: &StepInput<'_>, words: &mut Vec<u32>) {
        words.clear();
        words.resize(self.table_start(), 0);
        (words[0], words[1]) = (input.tokens.len() as u32, input.output_rows.len() as u32);
        let mut put = |start: usize, values: &mut dyn Iterator<Item = u32>| {
            words[start..].iter_mut().zip(values).for_each(|(word, value)| *word = value);
        };
        put(HEADER, &mut input.tokens.iter().map(|token| token.0));
        put(HEADER + self.tokens, &mut input.positions.iter().copied());
        let owner = |row: u32| input.query_ends.partition_point(|&end| end <= row) as u32;
        put(HEADER + 2 * self.tokens, &mut (0..input.tokens.len() as u32).map(owner));
        put(self.outputs_start(), &mut input.output_rows.iter().copied());
        let ends = input.block_tables.ends.iter().copied();
        put(
            self.outputs_start() + self.outputs,
            &mut std::iter::once(0).chain(ends).take(self.sequences),
        );
        put(self.draws_start(), &mut input.draws.iter().flat_map(|&draw| draw_words(draw)));
        for (i, decl) in program.ropes.iter().enumerate() {
            let row = |(token, &len): (usize, &u32)| speed_row(decl, token, len);
            let rows = input.rope_lens.iter().enumerate().map(row);
            put(self.ropes_start() + i * self.tokens, &mut { rows });
        }
        words.extend(input.block_tables.blocks.iter().map(|block| block.0));
    }
}

/// A draw as kernels read it.
fn draw_words(draw: Option<Draw>) -> [u32; DRAW] {
    let Some(Draw { key, temperature }) = draw else { return [0; DRAW] };
    let kind = if temperature == 0.0 { 1 } else { 2 };
    [kind, temperature.to_bits(), key as u32, (key >> 32) as u32]
}

/// The row of a token's speeds: see [`fixed_speeds`].
fn speed_row(decl: &RopeDecl, token: usize, len: u32) -> u32 {
    match decl.speeds {
        RopeSpeeds::Fixed(_) => 0,
        RopeSpeeds::Switched { switch, .. } => u32::from(len > switch),
        RopeSpeeds::DynamicNtk { .. } => token as u32,
    }
}

/// The speeds `[rows, width / 2]` of a rotary table that are the same at every step: one row, or the
/// short and the long one; none where each token has a row of its own ([`token_speeds`]).
pub(crate) fn fixed_speeds(decl: &RopeDecl) -> Option<Vec<f32>> {
    match &decl.speeds {
        RopeSpeeds::Fixed(speeds) => Some(speeds.clone()),
        RopeSpeeds::Switched { short, long, .. } => Some([short.as_slice(), long].concat()),
        RopeSpeeds::DynamicNtk { .. } => None,
    }
}

/// The speeds `[t, width / 2]` of a step's tokens.
pub(crate) fn token_speeds(decl: &RopeDecl, input: &StepInput<'_>, out: &mut Vec<f32>) {
    out.clear();
    input.rope_lens.iter().for_each(|&len| out.extend_from_slice(&rope::speeds(decl, len)));
}
