//! A model folder, opened: what it is, what it computes, and where its weights come from.
//!
//! [`Model::open`] reads configurations and headers only, so everything that cannot run is
//! refused at once; weights flow later through [`Model::weights`] into a backend.
//! Not here: tokenizer and template ([`crate::tokenizer`], [`crate::chat`]).

use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::config::{CONFIG, Reader, read_object};
use crate::families;
use crate::files::ModelFiles;
use crate::lower::lower;
use crate::quantization::Quantization;
use crate::spec::ModelSpec;
use crate::speculation::self_draft::kept_layers;
use crate::weights::{ModelWeights, Plan, Recipe, plan};
use kernels::Program;
use kernels::program::TokenId;
use quant::{Bits, Format};
use serde_json::Value;

/// A model that can be built on any backend.
#[derive(Debug)]
pub struct Model {
    files: ModelFiles,
    spec: ModelSpec,
    program: Program,
    checkpoint: Checkpoint,
    recipes: Vec<Recipe>,
    modules: Vec<ModuleInfo>,
    stop_tokens: Vec<TokenId>,
}

/// Choices of the caller about a model; the default keeps everything as the files have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ModelOptions {
    /// The head's matrix.
    pub head: Head,
    /// How many layers are kept ([`kept_layers`] says which); none is all. The tensors of the
    /// others are checked like any, and not loaded.
    pub layers: Option<usize>,
    /// Code width to which the matrices inside the layers are rounded on loading
    /// ([`quant::quantize`], per row and group of up to 128 columns) where the files have more:
    /// floats, or eight bits where four are asked for. A matrix of odd width cannot have four.
    pub bits: Option<Bits>,
}

/// In which format the head's matrix is delivered. One that the files have quantized stays so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Head {
    /// As the files have it.
    #[default]
    Keep,
    /// Floats become int8 codes ([`quant::quantize`]) on loading: half the bytes of f16. A
    /// matrix shared with the embedding keeps its floats there.
    Int8,
    /// Like [`Head::Int8`] where a layer of the model is quantized, else [`Head::Keep`].
    Auto,
}

/// A matrix of the checkpoint, for `inspect`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Name in the checkpoint: `model.layers.0.self_attn.q_proj` (quantized) or a tensor's name.
    pub name: String,
    /// `[n, k]`.
    pub shape: [usize; 2],
    /// The format it is delivered in.
    pub format: Format,
    /// How the file has it: `bf16`, `gptq v1 4-bit g128 sym act-order`.
    pub source: String,
}

impl Model {
    /// Opens a model with the default options: what the files say, exactly.
    ///
    /// # Errors
    /// Those of [`Model::open_with`].
    pub fn open(files: ModelFiles) -> Result<Self, Error> {
        Self::open_with(files, &ModelOptions::default())
    }

    /// Opens a model.
    ///
    /// # Errors
    /// Everything that makes the model unusable, except values inside weights: see the variants
    /// of [`Error`].
    pub fn open_with(files: ModelFiles, options: &ModelOptions) -> Result<Self, Error> {
        let config = read_object(&files, CONFIG)?.ok_or_else(|| Error::MissingFile {
            path: files.path(CONFIG),
            needed_for: "it says which architecture the model has; is this a model folder?"
                .to_owned(),
        })?;
        let config = Reader::new(files.path(CONFIG), config);
        let mut spec = families::read(&config)?;
        let quantization = Quantization::read(&files, &config)?;
        let stop_tokens = stop_tokens(&files, &config, spec.vocab)?;
        config.finish()?;
        let checkpoint = Checkpoint::open(&files)?;
        let kept = kept(&files, spec.layers.len(), options)?;
        let plan = plan(&checkpoint, &spec, &quantization, (options, &kept))?;
        let Plan { layout, tied_head, recipes, modules } = plan;
        spec.tied_head = tied_head;
        spec.layers = kept.iter().map(|&i| spec.layers[i].clone()).collect();
        let program = lower(&spec, layout);
        Ok(Self { files, spec, program, checkpoint, recipes, modules, stop_tokens })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What it computes.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Its weights, one at a time.
    pub fn weights(&self) -> ModelWeights<'_> {
        ModelWeights::new(&self.checkpoint, &self.program.weights, &self.recipes)
    }

    /// The bytes of each file that holds weights, in order of the files' names.
    pub fn weight_files(&self) -> impl Iterator<Item = &[u8]> {
        self.checkpoint.files()
    }

    /// Where its files come from.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// Tokens that end a sequence, as the files say.
    pub fn stop_tokens(&self) -> &[TokenId] {
        &self.stop_tokens
    }

    /// Every matrix of the checkpoint in the order it is loaded.
    pub fn modules(&self) -> &[ModuleInfo] {
        &self.modules
    }
}

/// Which of `all` layers the options keep, ascending.
fn kept(files: &ModelFiles, all: usize, options: &ModelOptions) -> Result<Vec<usize>, Error> {
    let wanted = options.layers.unwrap_or(all);
    if wanted == 0 || wanted > all {
        return Err(Error::Choice {
            path: files.path(CONFIG),
            option: "layers",
            expected: format!("1 to {all}, since the model has {all} layers"),
            found: wanted.to_string(),
        });
    }
    Ok(kept_layers(all, wanted))
}

const EOS: &str = "eos_token_id";

/// `eos_token_id` of `generation_config.json`, or else of `config.json`.
fn stop_tokens(files: &ModelFiles, config: &Reader, vocab: usize) -> Result<Vec<TokenId>, Error> {
    let name = "generation_config.json";
    let own = eos_tokens(config, vocab)?;
    let Some(map) = read_object(files, name)? else { return Ok(own) };
    let generation = Reader::new(files.path(name), map);
    Ok(if generation.value(EOS).is_some() { eos_tokens(&generation, vocab)? } else { own })
}

/// One id or a list of them; ids beyond the vocabulary can never be generated.
fn eos_tokens(reader: &Reader, vocab: usize) -> Result<Vec<TokenId>, Error> {
    let Some(value) = reader.value(EOS) else { return Ok(Vec::new()) };
    let list = match value {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    let ids = list.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>();
    let ids = ids.ok_or_else(|| reader.error(EOS, "a token id or a list of token ids"))?;
    let inside = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < vocab);
    Ok(ids.into_iter().filter(inside).map(|id| TokenId(id as u32)).collect())
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
