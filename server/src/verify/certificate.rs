//! What `verify` prints: a certificate, or the first divergence with the logits behind it.
//!
//! Not here: running and comparing ([`super`]).

use super::rows::Row;
use super::{BothWays, Difference, Output, position};
use crate::Io;
use crate::cli::{DeviceArgs, DeviceName, SamplingArgs, VerifyArgs};
use crate::speculate::Draft;
use crate::{inspect, load};
use engine::model::Model;
use engine::request::Request;
use engine::tokenizer::Tokenizer;
use kernels::Backend;
use kernels::cpu::Isa;
use kernels::program::TokenId;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Everything it is made of.
pub(super) struct Certificate<'a> {
    pub args: &'a VerifyArgs,
    pub model: &'a Model,
    pub draft: &'a Draft,
    pub both: &'a BothWays,
}

impl Certificate<'_> {
    pub(super) fn print(
        &self,
        requests: &[Request],
        backend: &dyn Backend,
        io: &mut Io<'_>,
    ) -> anyhow::Result<()> {
        let object = self.json(requests, backend);
        if self.args.json {
            writeln!(io.out, "{object}")?;
        } else {
            write!(io.out, "{}", text(&object))?;
        }
        Ok(())
    }

    fn json(&self, requests: &[Request], backend: &dyn Backend) -> Value {
        let both = self.both;
        let divergence = both.divergence();
        json!({
            "identical": divergence.is_none(),
            "prompts": requests.len(),
            "tokens": both.tokens(),
            "tokens_from_identical_logits": both.same_rows(requests),
            "divergence": divergence.map(|(i, at)| self.divergence(&requests[i], i, at)),
            "speculation": self.draft.json(&both.ending),
            "sampling": sampling(&self.args.sampling),
            "device": device(&self.args.device, backend),
            "kernels": self.kernels(backend),
            "verifier": weights(self.args.model.as_deref().unwrap_or("demo"), self.model),
            "draft": self.draft.model().map(|model| weights(&self.draft.name(), model)),
            "outputs_sha256": {
                "plain": outputs_sha256(&both.plain),
                "drafted": outputs_sha256(&both.drafted),
            },
            "version": env!("CARGO_PKG_VERSION"),
        })
    }

    /// The kernel of each format that either model uses.
    fn kernels(&self, backend: &dyn Backend) -> Value {
        let mut formats = inspect::formats(self.model);
        formats.extend(self.draft.model().map(inspect::formats).unwrap_or_default());
        let named = formats.iter().map(|f| (f.to_string(), json!(backend.kernel_for(*f))));
        Value::Object(named.collect())
    }

    fn divergence(&self, request: &Request, prompt: usize, difference: Difference) -> Value {
        let tokenizer = Tokenizer::from_files(self.model.files()).ok();
        let show = |id: TokenId| shown(id, tokenizer.as_ref());
        let position = position(request, difference.at);
        let side = |output: &Output, token: Option<TokenId>| {
            let row = output.rows.get(&position).map(|row| row_json(row, &show));
            json!({"token": token.map(show), "logits": row})
        };
        json!({
            "prompt": prompt + 1,
            "prompt_ids": request.prompt.iter().map(|id| id.0).collect::<Vec<_>>(),
            "generated_tokens_before": difference.at,
            "position": position + 1,
            "plain": side(&self.both.plain[prompt], difference.plain),
            "drafted": side(&self.both.drafted[prompt], difference.drafted),
        })
    }
}

/// Sampling parameters, for a program.
pub(crate) fn sampling(s: &SamplingArgs) -> Value {
    json!({
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "min_p": s.min_p,
        "typical_p": s.typical_p,
        "repetition_penalty": s.repetition_penalty,
        "frequency_penalty": s.frequency_penalty,
        "presence_penalty": s.presence_penalty,
        "logit_bias": s.logit_bias,
        "seed": s.seed,
    })
}

/// A device, for a program.
pub(crate) fn device(device: &DeviceArgs, backend: &dyn Backend) -> Value {
    let isa = (device.device == DeviceName::Cpu)
        .then(|| device.cpu_isa.map_or_else(Isa::best, load::isa).to_string());
    json!({"name": backend.name(), "isa": isa, "threads": load::threads(device)})
}

fn row_json(row: &Row, show: &dyn Fn(TokenId) -> Value) -> Value {
    let top: Vec<Value> = row
        .top
        .iter()
        .map(|(id, logit)| {
            let mut entry = show(*id);
            entry["logit"] = json!(logit);
            entry
        })
        .collect();
    json!({"row": row.row + 1, "rows_of_the_step": row.rows, "top": top})
}

fn shown(id: TokenId, tokenizer: Option<&Tokenizer>) -> Value {
    // A token that cannot be decoded still has its id.
    let text = tokenizer.and_then(|t| t.decode(&[id], false).ok());
    json!({"id": id.0, "text": text})
}

fn weights(name: &str, model: &Model) -> Value {
    let mut hash = Sha256::new();
    model.weight_files().for_each(|bytes| hash.update(bytes));
    json!({
        "name": name,
        "architecture": model.spec().architecture,
        "weights_sha256": hex(&hash.finalize()),
    })
}

/// Of all ids as 32-bit little-endian numbers, each output ended by 2^32 - 1.
fn outputs_sha256(outputs: &[Output]) -> String {
    let mut hash = Sha256::new();
    for output in outputs {
        output.ids.iter().for_each(|id| hash.update(id.0.to_le_bytes()));
        hash.update(u32::MAX.to_le_bytes());
    }
    hex(&hash.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The object in lines, for a person.
fn text(object: &Value) -> String {
    let mut lines = vec![verdict(object), String::new()];
    let mut line = |title: &str, text: &str| lines.push(format!("{title:<12} {text}"));
    line("speculation", &pairs(&object["speculation"]));
    line("sampling", &pairs(&object["sampling"]));
    line("device", &pairs(&object["device"]));
    for (format, kernel) in object["kernels"].as_object().into_iter().flatten() {
        line("kernel", &format!("{format}: {}", plain(kernel)));
    }
    line("verifier", &pairs(&object["verifier"]));
    if object["draft"].is_object() {
        line("draft", &pairs(&object["draft"]));
    }
    line("outputs", &format!("sha256 {}", pairs(&object["outputs_sha256"])));
    line("foretoken", &plain(&object["version"]));
    lines.push(String::new());
    lines.join("\n")
}

fn verdict(object: &Value) -> String {
    let (prompts, tokens) = (&object["prompts"], &object["tokens"]);
    let same = &object["tokens_from_identical_logits"];
    let divergence = &object["divergence"];
    if !divergence.is_object() {
        let little = match object["speculation"]["drafted_tokens"].as_u64() {
            Some(0) => "; nothing was drafted, so this says little",
            _ => "",
        };
        return format!(
            "identical: {tokens} tokens of {prompts} prompts are the same with and without the draft, {same} of them from logits that are the same bits{little}"
        );
    }
    let before = &divergence["generated_tokens_before"];
    let mut lines = vec![format!(
        "DIVERGED: prompt {}, position {}, after {before} equal generated tokens ({same} of {tokens} tokens come from logits that are the same bits)",
        divergence["prompt"], divergence["position"],
    )];
    for (name, side) in [("without", &divergence["plain"]), ("with", &divergence["drafted"])] {
        let (token, logits) = (&side["token"], &side["logits"]);
        let chosen = if token.is_object() { entry(token) } else { "the end".to_owned() };
        lines.push(format!("{name} the draft: {chosen}"));
        if logits.is_object() {
            let (row, rows) = (&logits["row"], &logits["rows_of_the_step"]);
            lines
                .push(format!("  chosen from row {row} of a step of {rows}; its greatest logits:"));
        }
        for one in logits["top"].as_array().into_iter().flatten() {
            lines.push(format!("  {:>14} {}", plain(&one["logit"]), entry(one)));
        }
    }
    lines.join("\n")
}

fn entry(token: &Value) -> String {
    format!("token {} {}", token["id"], token["text"])
}

/// `name value, name value` of an object's members that have a value.
fn pairs(object: &Value) -> String {
    let members = object.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let words = members.map(|(name, value)| format!("{} {}", name.replace('_', " "), plain(value)));
    words.collect::<Vec<_>>().join(", ")
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
