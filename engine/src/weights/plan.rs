//! Gives every weight of a model an id, a declaration and a recipe.
//!
//! Tensor names are those of the Llama layout, which all supported families share. Not here:
//! delivering ([`super::ModelWeights`]). Input: a checkpoint's headers and a specification.

use super::Recipe;
use super::modules::{Module, Modules};
use crate::Error;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::lower::{LayerWeights, Layout, Projection};
use crate::model::{Head, ModelOptions, ModuleInfo};
use crate::quantization::Quantization;
use crate::spec::{LayerSpec, ModelSpec};
use kernels::program::{WeightDecl, WeightId};
use quant::{Bits, FloatType, Format};

/// All weights of a model.
#[derive(Debug)]
pub struct Plan {
    /// Ids by role, and declarations.
    pub layout: Layout,
    /// Whether the checkpoint has one matrix for the head and the embedding.
    pub tied_head: bool,
    /// How each weight is made, by id.
    pub recipes: Vec<Recipe>,
    /// Every matrix of the checkpoint, for `inspect`.
    pub modules: Vec<ModuleInfo>,
}

/// Finds all weights of the layers `kept` of `spec` and of the rest of the model.
///
/// Skipped layers are looked up like the others, so what is wrong with their tensors is an error.
///
/// # Errors
/// [`Error::Choice`] if rounding to `options.bits` would change nothing,
/// [`Error::Tensor`] for one that is absent or has another shape or type, [`Error::Weight`] for
/// a packing that does not fit its shape, [`Error::UnusedTensors`] for what is left over.
pub fn plan(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    quantization: &Quantization,
    (options, kept): (&ModelOptions, &[usize]),
) -> Result<Plan, Error> {
    let mut planner = Planner {
        source: Modules::new(checkpoint, quantization),
        prefix: prefix(checkpoint),
        decls: Vec::new(),
        recipes: Vec::new(),
        modules: Vec::new(),
        bits: options.bits,
        rounded: 0,
    };
    let (layout, tied_head) = planner.model(spec, kept, options.head)?;
    planner.source.finish()?;
    planner.check_bits()?;
    Ok(Plan { layout, tied_head, recipes: planner.recipes, modules: planner.modules })
}

/// Names of a model with a head start with `model.`, those of a bare one do not.
fn prefix(checkpoint: &Checkpoint) -> &'static str {
    let mut names = checkpoint.ids().map(|id| &checkpoint.info(id).name);
    if names.any(|name| name.starts_with("model.")) { "model." } else { "" }
}

struct Planner<'a> {
    source: Modules<'a>,
    prefix: &'static str,
    decls: Vec<WeightDecl>,
    recipes: Vec<Recipe>,
    modules: Vec<ModuleInfo>,
    /// What the matrices of layers are rounded to, where that is less than they have.
    bits: Option<Bits>,
    /// How many of them were.
    rounded: usize,
}

impl Planner<'_> {
    /// All weights by role, and whether the head's matrix is the embedding's.
    fn model(
        &mut self,
        spec: &ModelSpec,
        kept: &[usize],
        choice: Head,
    ) -> Result<(Layout, bool), Error> {
        let (table, own_head) = self.embed_and_head(spec)?;
        let tied = own_head.is_none();
        let mut head = own_head.unwrap_or_else(|| table.clone());
        let embed = self.add("embed", vec![table]);
        let layers = self.layers(spec, kept)?;
        let norm = self.vector("norm", &format!("{}norm.weight", self.prefix), spec.width)?;
        let int8 = choice == Head::Int8 || choice == Head::Auto && self.any_grouped();
        let rounded = int8 && head.round_to(Bits::Eight);
        let head = if tied && !rounded { embed } else { self.add("head", vec![head]) };
        Ok((Layout { decls: std::mem::take(&mut self.decls), embed, layers, norm, head }, tied))
    }

    /// The layers `kept`, numbered anew; the tensors of the others are taken and their weights
    /// forgotten.
    fn layers(&mut self, spec: &ModelSpec, kept: &[usize]) -> Result<Vec<LayerWeights>, Error> {
        let mut layers = Vec::with_capacity(kept.len());
        for (i, layer) in spec.layers.iter().enumerate() {
            let before = [self.decls.len(), self.recipes.len(), self.modules.len(), self.rounded];
            let weights = self.layer([i, layers.len()], layer, spec.width)?;
            if kept.contains(&i) {
                layers.push(weights);
                continue;
            }
            self.decls.truncate(before[0]);
            self.recipes.truncate(before[1]);
            self.modules.truncate(before[2]);
            self.rounded = before[3];
        }
        Ok(layers)
    }

    /// Rounding that was asked for must have rounded something.
    fn check_bits(&self) -> Result<(), Error> {
        match self.bits {
            Some(bits) if self.rounded == 0 => Err(Error::Choice {
                path: self.source.checkpoint.root().to_owned(),
                option: "bits",
                expected: "fewer than the matrices of the layers have".to_owned(),
                found: bits.count().to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Whether a matrix declared so far is quantized.
    fn any_grouped(&self) -> bool {
        self.decls.iter().any(|decl| matches!(decl.format, Format::Grouped { .. }))
    }

    /// The embedding's matrix, and the head's where it is another.
    ///
    /// Where the configuration ties them, either name may be the one that is stored; both are
    /// two matrices unless they are equal.
    fn embed_and_head(&self, spec: &ModelSpec) -> Result<(Module, Option<Module>), Error> {
        let shape = [spec.vocab, spec.width];
        let table = format!("{}embed_tokens", self.prefix);
        let embed = self.source.checkpoint.find(&format!("{table}.weight"));
        let head = self.source.checkpoint.find("lm_head.weight");
        let head_stored = self.stored("lm_head.");
        let alone = spec.tied_head && embed.is_none() && head.is_some();
        let table = if alone { "lm_head" } else { &table };
        let module = self.source.matrix(table, &shape, shape)?;
        let shared = spec.tied_head && (alone || !head_stored || self.equal(embed, head));
        if shared {
            self.source.take("lm_head.weight");
            return Ok((module, None));
        }
        Ok((module, Some(self.source.linear("lm_head", shape)?)))
    }

    fn equal(&self, a: Option<TensorId>, b: Option<TensorId>) -> bool {
        a.zip(b).is_some_and(|(a, b)| self.source.same_bytes(a, b))
    }

    fn stored(&self, start: &str) -> bool {
        let checkpoint = self.source.checkpoint;
        checkpoint.ids().any(|id| checkpoint.info(id).name.starts_with(start))
    }

    /// Layer `i` of the checkpoint as layer `label` of the program.
    fn layer(
        &mut self,
        [i, label]: [usize; 2],
        layer: &LayerSpec,
        d: usize,
    ) -> Result<LayerWeights, Error> {
        let prefix = self.prefix;
        let name = |tail: &str| format!("{prefix}layers.{i}.{tail}");
        let attn = |tail: &str| name(&format!("self_attn.{tail}"));
        let mlp = |tail: &str| name(&format!("mlp.{tail}"));
        let (a, f) = (&layer.attn, layer.mlp.width);
        let [q_width, kv_width] = [a.heads, a.kv_heads].map(|heads| heads * a.head_width);
        let qkv = [
            ("q", attn("q_proj"), q_width),
            ("k", attn("k_proj"), kv_width),
            ("v", attn("v_proj"), kv_width),
        ];
        let gate_up = [("gate", mlp("gate_proj"), f), ("up", mlp("up_proj"), f)];
        let (out, down) = ([("out", attn("o_proj"), d)], [("down", mlp("down_proj"), d)]);
        let norms = [name("input_layernorm.weight"), name("post_attention_layernorm.weight")];
        let head_norms = [attn("q_norm.weight"), attn("k_norm.weight")];
        let [attn_label, mlp_label] =
            ["attn", "mlp"].map(|block| format!("layers.{label}.{block}"));
        Ok(LayerWeights {
            attn_norm: self.vector(&format!("{attn_label}.norm"), &norms[0], d)?,
            qkv: self.linears([&attn_label, "qkv"], &qkv, d, a.qkv_bias)?,
            qk_norms: match a.qk_norm_eps {
                None => None,
                Some(_) => Some([
                    self.vector(&format!("{attn_label}.q_norm"), &head_norms[0], a.head_width)?,
                    self.vector(&format!("{attn_label}.k_norm"), &head_norms[1], a.head_width)?,
                ]),
            },
            out_norm: self.sub_norm(
                &format!("{attn_label}.out_norm"),
                &attn("attn_sub_norm.weight"),
                a.out_norm_eps.map(|_| q_width),
            )?,
            out: self.linears([&attn_label, "out"], &out, q_width, a.out_bias)?[0],
            mlp_norm: self.vector(&format!("{mlp_label}.norm"), &norms[1], d)?,
            gate_up: self.linears([&mlp_label, "gate_up"], &gate_up, d, layer.mlp.bias)?,
            down_norm: self.sub_norm(
                &format!("{mlp_label}.down_norm"),
                &mlp("ffn_sub_norm.weight"),
                layer.mlp.down_norm_eps.map(|_| f),
            )?,
            down: self.linears([&mlp_label, "down"], &down, f, layer.mlp.bias)?[0],
        })
    }

    /// The norm inside a block, of the given width, where there is one.
    fn sub_norm(
        &mut self,
        label: &str,
        tensor: &str,
        width: Option<usize>,
    ) -> Result<Option<WeightId>, Error> {
        width.map(|width| self.vector(label, tensor, width)).transpose()
    }

    fn vector(&mut self, label: &str, tensor: &str, len: usize) -> Result<WeightId, Error> {
        let module = self.source.vector(tensor, len)?;
        Ok(self.declare(label.to_owned(), &[&module]))
    }

    /// Linear modules `(label, name, rows)` of input width `k`: one weight if they stack.
    fn linears(
        &mut self,
        [block, fused]: [&str; 2],
        parts: &[(&str, String, usize)],
        k: usize,
        bias: bool,
    ) -> Result<Vec<Projection>, Error> {
        let mut weights = Vec::with_capacity(parts.len());
        let mut biases = Vec::with_capacity(parts.len());
        for (_, name, n) in parts {
            let mut weight = self.source.linear(name, [*n, k])?;
            let rounded = self.bits.is_some_and(|bits| weight.round_to(bits));
            self.rounded += usize::from(rounded);
            weights.push(weight);
            if bias {
                biases.push(self.source.vector(&format!("{name}.bias"), *n)?);
            }
        }
        if self.stacks(&weights) {
            let label = format!("{block}.{fused}");
            let bias = bias.then(|| self.declare_bias(&label, &refs(&biases)));
            return Ok(vec![Projection { weight: self.add(&label, weights), bias }]);
        }
        let mut biases = biases.iter();
        let one = |((label, ..), weight): (&(&str, String, usize), Module)| {
            let label = format!("{block}.{label}");
            let bias = biases.next().map(|b| self.declare_bias(&label, &[b]));
            Projection { weight: self.add(&label, vec![weight]), bias }
        };
        Ok(parts.iter().zip(weights).map(one).collect())
    }

    /// Whether the rows of all modules can be one matrix.
    fn stacks(&self, modules: &[Module]) -> bool {
        let first = &modules[0];
        let like_first = |m: &Module| m.format == first.format && self.source.same_order(first, m);
        modules[1..].iter().all(like_first)
    }

    /// Adds matrices that stack as one weight and lists each for `inspect`.
    fn add(&mut self, label: &str, modules: Vec<Module>) -> WeightId {
        let id = self.declare(label.to_owned(), &refs(&modules));
        let infos = modules.into_iter().map(|m| ModuleInfo {
            name: m.name,
            shape: m.part.shape,
            format: m.format,
            source: m.wording,
        });
        self.modules.extend(infos);
        id
    }

    /// Declares a weight whose parts are rows below each other.
    fn declare(&mut self, label: String, modules: &[&Module]) -> WeightId {
        let rows = modules.iter().map(|m| m.part.shape[0]).sum();
        let shape = [rows, modules[0].part.shape[1]];
        self.declare_as(label, shape, modules)
    }

    /// Declares a vector whose parts lie side by side.
    fn declare_bias(&mut self, label: &str, modules: &[&Module]) -> WeightId {
        let shape = [1, modules.iter().map(|m| m.part.shape[1]).sum()];
        self.declare_as(format!("{label}.bias"), shape, modules)
    }

    fn declare_as(&mut self, label: String, shape: [usize; 2], modules: &[&Module]) -> WeightId {
        let id = WeightId(self.decls.len() as u32);
        self.decls.push(WeightDecl::new(label, shape, common_format(modules)));
        self.recipes.push(Recipe(modules.iter().map(|m| m.part.clone()).collect()));
        id
    }
}

fn refs(modules: &[Module]) -> Vec<&Module> {
    modules.iter().collect()
}

/// The format all share; biases of different float types meet in f32, which holds each exactly.
fn common_format(modules: &[&Module]) -> Format {
    let first = modules[0].format;
    if modules.iter().all(|m| m.format == first) { first } else { Format::Dense(FloatType::F32) }
}
