//! What `draft-rank` prints: a table, best draft first, or one JSON object.
//!
//! Input: what was found of each draft. Not here: finding it ([`super`]).

use super::texts::Text;
use super::{Prediction, Ranked};
use crate::Io;
use crate::cli::{RankArgs, RuleName};
use crate::verify::certificate;
use engine::speculation::rank::{Estimate, Estimates};
use engine::speculation::{Costs, Curve};
use kernels::Backend;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Everything that was found.
#[derive(Default)]
pub(super) struct Findings {
    pub(super) texts: Vec<Text>,
    pub(super) ranked: Vec<Ranked>,
    pub(super) refused: Vec<Refused>,
}

/// A draft that cannot be ranked.
pub(super) struct Refused {
    pub(super) draft: String,
    pub(super) reason: String,
}

impl Findings {
    /// Best first by `rule`: the greatest speed-up, then the greatest acceptance.
    pub(super) fn sort(&mut self, rule: RuleName) {
        let merit = |r: &Ranked| (r.prediction(rule).speedup(), r.prediction(rule).acceptance.mean);
        self.ranked.sort_by(|a, b| {
            let (a, b) = (merit(a), merit(b));
            b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1))
        });
    }

    pub(super) fn print(
        &self,
        args: &RankArgs,
        backend: &dyn Backend,
        io: &mut Io<'_>,
    ) -> anyhow::Result<()> {
        if io.err_is_terminal {
            // Takes away the line of progress; one that stays does no harm.
            let _ = write!(io.err, "\r\x1b[2K");
        }
        if args.json {
            writeln!(io.out, "{}", self.json(args, backend))?;
        } else {
            write!(io.out, "{}", self.text(args))?;
        }
        Ok(())
    }

    fn json(&self, args: &RankArgs, backend: &dyn Backend) -> Value {
        let refused = |r: &Refused| json!({"draft": r.draft, "reason": r.reason});
        json!({
            "target": args.target,
            "acceptance_rule": rule_name(args.acceptance_rule),
            "drafts": self.ranked.iter().map(Ranked::json).collect::<Vec<_>>(),
            "refused": self.refused.iter().map(refused).collect::<Vec<_>>(),
            "texts": self.texts.iter().map(text_json).collect::<Vec<_>>(),
            "sampling": certificate::sampling(&args.sampling),
            "device": certificate::device(&args.device, backend),
            "version": env!("CARGO_PKG_VERSION"),
        })
    }

    fn text(&self, args: &RankArgs) -> String {
        let mut lines = vec![];
        if !self.ranked.is_empty() {
            lines.extend([self.subject(args), String::new()]);
            lines.extend(table(&self.overall(args.acceptance_rule)));
            if args.details {
                let details = [("category", by_category as Rows), ("tokens before", by_distance)];
                for (title, rows) in details {
                    lines.push(String::new());
                    lines.extend(table(&self.details(title, rows)));
                }
            }
            lines.extend([String::new(), legend(args.acceptance_rule)]);
        }
        for refused in &self.refused {
            lines.push(format!("refused: {}: {}", refused.draft, refused.reason));
        }
        lines.push(String::new());
        lines.join("\n")
    }

    fn subject(&self, args: &RankArgs) -> String {
        let tokens: usize = self.texts.iter().map(Text::predicted).sum();
        let categories: BTreeSet<&str> = self.texts.iter().map(|t| t.category.as_str()).collect();
        format!(
            "{}: {tokens} tokens of {} texts ({}), temperature {}, seed {}",
            args.target,
            self.texts.len(),
            categories.into_iter().collect::<Vec<_>>().join(", "),
            args.sampling.temperature,
            args.sampling.seed,
        )
    }

    fn overall(&self, rule: RuleName) -> Vec<Vec<String>> {
        let titles = [
            "draft",
            "coupled",
            "rejection",
            "greedy",
            "counted",
            "break-even",
            "length",
            "speed-up",
        ];
        let row = |ranked: &Ranked| {
            let prediction = ranked.prediction(rule);
            let verdict = &prediction.verdict;
            let acceptances = acceptances(&ranked.report.overall);
            let break_even = verdict.break_even.map_or("none".to_owned(), |a| format!("{a:.2}"));
            let length = verdict.best_length.unwrap_or(0).to_string();
            let counted = estimate(&prediction.acceptance);
            let last = [counted, break_even, length, speedup(prediction)];
            [ranked.draft.clone()].into_iter().chain(acceptances).chain(last).collect()
        };
        let head = titles.map(str::to_owned).to_vec();
        [head].into_iter().chain(self.ranked.iter().map(row)).collect()
    }

    fn details(&self, title: &str, rows: Rows) -> Vec<Vec<String>> {
        let titles = ["draft", title, "tokens", "texts", "coupled", "rejection", "greedy"];
        let row = |draft: &str, (name, e): (String, Estimates)| {
            let counts = [e.positions, e.prompts].map(|n| n.to_string());
            let names = [draft.to_owned(), name];
            names.into_iter().chain(counts).chain(acceptances(&e)).collect::<Vec<_>>()
        };
        let all = self.ranked.iter().flat_map(|ranked| {
            rows(ranked).into_iter().map(move |found| row(&ranked.draft, found))
        });
        let head = titles.map(str::to_owned).to_vec();
        [head].into_iter().chain(all).collect()
    }
}

/// The parts into which the texts of a draft fall.
type Rows = fn(&Ranked) -> Vec<(String, Estimates)>;

fn by_category(ranked: &Ranked) -> Vec<(String, Estimates)> {
    ranked.report.by_category.clone()
}

fn by_distance(ranked: &Ranked) -> Vec<(String, Estimates)> {
    let name = |(range, e): &(std::ops::Range<u32>, Estimates)| match range.end {
        u32::MAX => (format!("{} or more", range.start), *e),
        end => (format!("{} to {}", range.start, end - 1), *e),
    };
    ranked.report.by_distance.iter().map(name).collect()
}

fn acceptances(e: &Estimates) -> [String; 3] {
    [e.coupled, e.rejection, e.greedy].map(|e| estimate(&e))
}

fn estimate(estimate: &Estimate) -> String {
    match estimate.half_width {
        Some(half) => format!("{:.3} ± {half:.3}", estimate.mean),
        None => format!("{:.3}", estimate.mean),
    }
}

fn speedup(prediction: &Prediction) -> String {
    let interval = prediction.interval.map(|[low, high]| format!(" ({low:.2} to {high:.2})"));
    format!("{:.2}x{}", prediction.speedup(), interval.unwrap_or_default())
}

fn legend(rule: RuleName) -> String {
    let rule = rule_name(rule);
    format!(
        "coupled, rejection: chance that each --acceptance-rule accepts a drafted token, over all \
         tokens; greedy: share of\nequal first choices; ±: 95 % of such sets of texts. With \
         --acceptance-rule {rule}: counted, the acceptance of a run\nthat drafts one token a \
         cycle; break-even, the acceptance that pays by the costs measured here; length, the \
         best\nnumber of tokens to draft; speed-up, over no draft, for one sequence."
    )
}

/// Columns as wide as their widest cell: the first to the left, the others to the right.
fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cells = |i: usize| rows.iter().filter_map(move |row| row.get(i));
    let width = |i: usize| cells(i).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cell = |(i, (cell, width)): (usize, (&String, &usize))| match i {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        };
        row.iter().zip(&widths).enumerate().map(cell).collect::<Vec<_>>().join("  ")
    };
    rows.iter().map(line).collect()
}

impl Ranked {
    fn json(&self) -> Value {
        let category = |(name, e): &(String, Estimates)| (name.clone(), estimates_json(e));
        let distance = |(range, e): &(std::ops::Range<u32>, Estimates)| {
            let mut object = estimates_json(e);
            object["from"] = json!(range.start);
            object["to"] = json!((range.end < u32::MAX).then_some(range.end));
            object
        };
        let report = &self.report;
        json!({
            "draft": self.draft,
            "acceptance": estimates_json(&report.overall),
            "prediction": {
                "coupled": prediction_json(&self.coupled),
                "rejection": prediction_json(&self.rejection),
            },
            "by_category": report.by_category.iter().map(category).collect::<Map<_, _>>(),
            "by_tokens_before": report.by_distance.iter().map(distance).collect::<Vec<_>>(),
            "seconds": costs_json(&self.costs),
        })
    }
}

fn rule_name(rule: RuleName) -> &'static str {
    match rule {
        RuleName::Coupled => "coupled",
        RuleName::Rejection => "rejection",
    }
}

fn estimates_json(e: &Estimates) -> Value {
    json!({
        "tokens": e.positions,
        "texts": e.prompts,
        "coupled": estimate_json(&e.coupled),
        "rejection": estimate_json(&e.rejection),
        "greedy": estimate_json(&e.greedy),
    })
}

fn estimate_json(e: &Estimate) -> Value {
    json!({"mean": e.mean, "standard_error": e.error, "half_width_95": e.half_width})
}

fn prediction_json(prediction: &Prediction) -> Value {
    json!({
        "acceptance": estimate_json(&prediction.acceptance),
        "speedup": prediction.speedup(),
        "speedup_95": prediction.interval,
        "draft_tokens": prediction.verdict.best_length,
        "break_even_acceptance": prediction.verdict.break_even,
    })
}

fn costs_json(costs: &Costs) -> Value {
    let curve = |curve: &Curve| {
        let point = |(rows, seconds): &(usize, f64)| json!({"rows": rows, "seconds": seconds});
        curve.points().iter().map(point).collect::<Vec<_>>()
    };
    let draft = costs.draft.as_ref();
    json!({
        "target_step": curve(&costs.verify),
        "draft_step": draft.map(|d| d.step.seconds(1)),
        "draft_start": draft.map(|d| d.start),
        "draft_prefill_token": draft.map(|d| d.prefill_token),
        "sampling_token": costs.token,
    })
}

fn text_json(text: &Text) -> Value {
    json!({
        "category": text.category,
        "seed": text.sampling.seed,
        "prompt_tokens": text.prompt_len,
        "ids": text.ids.iter().map(|id| id.0).collect::<Vec<_>>(),
    })
}
