//! From `config.json` to a [`ModelSpec`]: a table of architectures, one short function each.
//!
//! The meaning of every key follows transformers 5; both its spelling and that of transformers 4
//! are read. A key that would change the result and is not supported is refused by name.
//! Not here: tensor names ([`crate::weights`]), quantization ([`crate::quantization`]).

mod bitnet;
mod dims;
mod llama;
mod mistral;
mod qwen;
mod rope;
pub mod shapes;

use crate::Error;
use crate::config::Reader;
use crate::spec::ModelSpec;

/// One architecture: its names and the function that reads its configuration.
struct Family {
    architecture: &'static str,
    /// The same without a language model head; loads where the head is tied.
    base: &'static str,
    model_type: &'static str,
    read: fn(&Reader) -> Result<ModelSpec, Error>,
}

const FAMILIES: &[Family] = &[
    Family {
        architecture: "LlamaForCausalLM",
        base: "LlamaModel",
        model_type: "llama",
        read: llama::read,
    },
    Family {
        architecture: "MistralForCausalLM",
        base: "MistralModel",
        model_type: "mistral",
        read: mistral::read,
    },
    Family {
        architecture: "Qwen2ForCausalLM",
        base: "Qwen2Model",
        model_type: "qwen2",
        read: qwen::read_qwen2,
    },
    Family {
        architecture: "Qwen3ForCausalLM",
        base: "Qwen3Model",
        model_type: "qwen3",
        read: qwen::read_qwen3,
    },
    Family {
        architecture: "BitNetForCausalLM",
        base: "BitNetModel",
        model_type: "bitnet",
        read: bitnet::read,
    },
];

/// Reads the specification of the architecture that `config` names.
///
/// # Errors
/// [`Error::Architecture`] for one that is not in the table, [`Error::Config`] for a key with a
/// value that is not supported.
pub fn read(config: &Reader) -> Result<ModelSpec, Error> {
    let family = find(config)?;
    let mut spec = (family.read)(config)?;
    family.architecture.clone_into(&mut spec.architecture);
    Ok(spec)
}

/// Architecture names of the table, comma separated.
pub fn known() -> String {
    FAMILIES.iter().map(|f| f.architecture).collect::<Vec<_>>().join(", ")
}

fn find(config: &Reader) -> Result<&'static Family, Error> {
    let names = config.texts("architectures")?.unwrap_or_default();
    let model_type = config.text("model_type")?;
    let unknown = |found: String| Error::Architecture { found, known: known() };
    let named = |f: &&Family| match names.as_slice() {
        [] => Some(f.model_type) == model_type,
        some => some.iter().any(|n| [f.architecture, f.base].contains(n)),
    };
    let family = FAMILIES.iter().find(named).ok_or_else(|| {
        let model_type = model_type.unwrap_or("nothing");
        unknown(if names.is_empty() { model_type.to_owned() } else { names.join(", ") })
    })?;
    if model_type.is_some_and(|t| t != family.model_type) {
        let expected = format!("{} as architectures says", family.model_type);
        return Err(config.error("model_type", expected));
    }
    Ok(family)
}

#[cfg(test)]
mod tests;
