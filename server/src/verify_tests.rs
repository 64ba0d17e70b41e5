//! A fault that is planted must be found, and nothing else.

use super::*;
use crate::cli::{Cli, Command};
use crate::demo;
use clap::Parser;
use kernels::backend::RunnerMemory;
use kernels::cpu::{CpuBackend, CpuOptions};
use kernels::program::{Program, SlotId};
use kernels::{Error, Runner, StepInput, StepLimits, StepOutput, WeightSource};
use serde_json::Value;

fn ids(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().map(|&id| TokenId(id)).collect()
}

#[test]
fn the_first_difference_is_found_also_where_one_output_ends() {
    let find = |a: &[u32], b: &[u32]| first_difference(&ids(a), &ids(b));
    assert_eq!(find(&[1, 2], &[1, 2]), None);
    let found = find(&[1, 2, 3], &[1, 5, 4]).unwrap();
    let (plain, drafted) = (Some(TokenId(2)), Some(TokenId(5)));
    assert_eq!(found, Difference { at: 1, plain, drafted });
    let shorter = find(&[1, 2], &[1]).unwrap();
    assert_eq!(shorter, Difference { at: 1, plain: Some(TokenId(2)), drafted: None });
    assert!(shorter.to_string().contains("the end with it"), "{shorter}");
}

/// The cpu with kernels that give token 7 too much in every second and later row of a step.
#[derive(Debug)]
struct FaultyBackend(CpuBackend);

struct FaultyRunner {
    inner: Box<dyn Runner>,
    vocab: usize,
}

impl Backend for FaultyBackend {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn kernel_for(&self, format: quant::Format) -> String {
        self.0.kernel_for(format)
    }

    fn build(
        &self,
        program: &Program,
        weights: &dyn WeightSource,
        limits: &StepLimits,
    ) -> Result<Box<dyn Runner>, Error> {
        let inner = self.0.build(program, weights, limits)?;
        Ok(Box::new(FaultyRunner { inner, vocab: 4096 }))
    }
}

impl Runner for FaultyRunner {
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
        self.inner.step(input, output)?;
        for row in output.logits.chunks_exact_mut(self.vocab).skip(1) {
            row[7] += 1e6;
        }
        Ok(())
    }

    fn read_slot(&mut self, slot: SlotId, out: &mut Vec<f32>) -> Result<(), Error> {
        self.inner.read_slot(slot, out)
    }

    fn memory(&self) -> RunnerMemory {
        self.inner.memory()
    }

    fn poison(&mut self, live: &[usize]) {
        self.inner.poison(live);
    }
}

/// Verifies the demo pair on `backend`: the object and the text that are printed.
fn verified(backend: &dyn Backend) -> (Value, String) {
    let words = ["verify", "--ids", "0,301,12", "--max-tokens", "24", "--draft-tokens", "4"];
    let words = std::iter::once("foretoken").chain(words);
    let Command::Verify(args) = Cli::try_parse_from(words).unwrap().command else {
        panic!("these are arguments of verify")
    };
    let model = Model::open(demo::find("demo").unwrap()).unwrap();
    let draft = Draft::open(&args.speculation, &model, false, &args.device).unwrap().unwrap();
    let requests = requests(&args, &model, prompts::prompts(&args, &model).unwrap()).unwrap();
    let (mut out, mut err) = (vec![], vec![]);
    let mut io = Io {
        out: &mut out,
        err: &mut err,
        input: &mut std::io::empty(),
        out_is_terminal: false,
        err_is_terminal: false,
        input_is_terminal: true,
    };
    let both = both_ways(&model, &draft, &requests, backend, &mut io).unwrap();
    let mut certificate = args;
    for json in [true, false] {
        certificate.json = json;
        let args = &certificate;
        Certificate { args, model: &model, draft: &draft, both: &both }
            .print(&requests, backend, &mut io)
            .unwrap();
    }
    let out = String::from_utf8(out).unwrap();
    let (json, text) = out.split_once('\n').unwrap();
    (serde_json::from_str(json).unwrap(), text.to_owned())
}

fn cpu() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: Some(1), isa: None }).unwrap()
}

#[test]
fn healthy_kernels_get_a_certificate() {
    let (object, text) = verified(&cpu());
    assert_eq!(object["identical"], true, "{text}");
    assert_eq!(object["divergence"], Value::Null);
    assert_eq!(object["tokens_from_identical_logits"], object["tokens"]);
    assert!(object["speculation"]["accepted_tokens"].as_u64().unwrap() > 0, "{text}");
    let outputs = &object["outputs_sha256"];
    assert_eq!(outputs["plain"], outputs["drafted"]);
    assert!(text.starts_with("identical: "), "{text}");
}

#[test]
fn a_planted_fault_is_shown_with_both_rows() {
    let (object, text) = verified(&FaultyBackend(cpu()));
    assert_eq!(object["identical"], false, "{text}");
    let divergence = &object["divergence"];
    let [plain, drafted] = ["plain", "drafted"].map(|side| &divergence[side]);
    assert_eq!(drafted["token"]["id"], 7, "{text}");
    assert_ne!(plain["token"]["id"], 7, "{text}");
    // The row that was used: not the first of its step, and topped by the fault.
    assert!(drafted["logits"]["row"].as_u64().unwrap() > 1, "{text}");
    assert_eq!(drafted["logits"]["top"][0]["id"], 7);
    assert_eq!(plain["logits"]["rows_of_the_step"], 1);
    assert_eq!(plain["logits"]["top"].as_array().unwrap().len(), 5);
    assert_eq!(plain["logits"]["top"][0]["id"], plain["token"]["id"], "greedy takes the greatest");
    let before = divergence["generated_tokens_before"].as_u64().unwrap();
    assert!(object["tokens_from_identical_logits"].as_u64().unwrap() >= before, "{text}");
    assert_ne!(object["outputs_sha256"]["plain"], object["outputs_sha256"]["drafted"]);
    assert!(text.starts_with("DIVERGED: prompt 1, position "), "{text}");
}
