//! Sizes of published models, as the `config.json` texts they have: what can be measured with
//! made-up weights ([`crate::synthetic`]) where no checkpoint is at hand.
//!
//! Not here: weights, formats. The texts are read by the same code as a model folder's.

use crate::Error;
use crate::config::{CONFIG, Reader, parse_object};
use crate::spec::ModelSpec;
use std::path::Path;

/// The sizes of a published model.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// As it is typed: `tinyllama-1.1b`.
    pub name: &'static str,
    /// Whose sizes these are, in words.
    pub description: &'static str,
    config: &'static str,
}

/// All known shapes, families together, small ones first.
pub const SHAPES: &[Shape] = &[
    Shape {
        name: "tinyllama-1.1b",
        description: "TinyLlama 1.1B",
        config: r#"{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
            "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0}"#,
    },
    Shape {
        name: "smollm2-135m",
        description: "SmolLM2 135M",
        config: r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,
            "rope_theta": 100000.0, "tie_word_embeddings": true}"#,
    },
    Shape {
        name: "llama-2-7b",
        description: "Llama 2 7B",
        config: r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0}"#,
    },
    Shape {
        name: "llama-3.2-1b",
        description: "Llama 3.2 1B",
        config: r#"{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            "tie_word_embeddings": true}"#,
    },
    Shape {
        name: "llama-3.2-3b",
        description: "Llama 3.2 3B",
        config: r#"{"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            "tie_word_embeddings": true}"#,
    },
    Shape {
        name: "llama-3.1-8b",
        description: "Llama 3.1 8B",
        config: r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}}"#,
    },
    Shape {
        name: "llama-3.1-70b",
        description: "Llama 3.1 70B",
        config: r#"{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}}"#,
    },
    Shape {
        name: "qwen2.5-0.5b",
        description: "Qwen2.5 0.5B",
        config: r#"{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "tie_word_embeddings": true}"#,
    },
    Shape {
        name: "qwen2.5-1.5b",
        description: "Qwen2.5 1.5B",
        config: r#"{"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
            "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
            "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "tie_word_embeddings": true}"#,
    },
    Shape {
        name: "qwen2.5-3b",
        description: "Qwen2.5 3B",
        config: r#"{"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "tie_word_embeddings": true}"#,
    },
    Shape {
        name: "qwen2.5-7b",
        description: "Qwen2.5 7B",
        config: r#"{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0}"#,
    },
    Shape {
        name: "qwen2.5-14b",
        description: "Qwen2.5 14B",
        config: r#"{"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824,
            "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
            "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0}"#,
    },
    Shape {
        name: "qwen3-0.6b",
        description: "Qwen3 0.6B",
        config: r#"{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": true}"#,
    },
    Shape {
        name: "qwen3-1.7b",
        description: "Qwen3 1.7B",
        config: r#"{"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": true}"#,
    },
    Shape {
        name: "qwen3-4b",
        description: "Qwen3 4B",
        config: r#"{"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": true}"#,
    },
    Shape {
        name: "qwen3-8b",
        description: "Qwen3 8B",
        config: r#"{"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0}"#,
    },
    Shape {
        name: "mistral-7b",
        description: "Mistral 7B v0.3",
        config: r#"{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 32768, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "sliding_window": null}"#,
    },
    Shape {
        name: "phi-4",
        description: "Phi-4 14B: its sizes as a Llama, since its own architecture is not supported",
        config: r#"{"model_type": "llama", "hidden_size": 5120, "intermediate_size": 17920,
            "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10,
            "vocab_size": 100352, "max_position_embeddings": 16384, "rms_norm_eps": 1e-05,
            "rope_theta": 250000.0}"#,
    },
];

/// The shape called `name`.
pub fn find(name: &str) -> Option<&'static Shape> {
    SHAPES.iter().find(|shape| shape.name == name)
}

impl Shape {
    /// What a model of this shape is.
    ///
    /// # Errors
    /// None for a row of the table; those of [`super::read`] otherwise.
    pub fn spec(&self) -> Result<ModelSpec, Error> {
        let path = Path::new(self.name).join(CONFIG);
        let config = parse_object(&path, self.config.as_bytes())?;
        let config = Reader::new(path, config);
        let spec = super::read(&config)?;
        config.finish()?;
        Ok(spec)
    }
}
