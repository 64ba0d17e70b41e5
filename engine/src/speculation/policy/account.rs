//! What drafting may cost: an account of time, and when to try again.
//!
//! Seconds of plain decoding are what its steps would have taken for the same tokens with as many
//! sequences. The account grows by them, with a small surcharge, and shrinks by the seconds that
//! the steps really take; nobody may draft so much that, were all of it rejected, it fell deeper
//! below zero than what is lent on the tokens to come. So whatever texts and drafters do, the time
//! (by the measured costs) stays below that of plain decoding and the surcharges; a text that ends
//! early leaves a debt, which the next ones pay before they draft. Not here: what pays ([`super`]).

/// Surcharge on the time of each generated token. The rest up to 0.02 is for costs that were
/// measured wrong.
const SURCHARGE: f64 = 0.010;
/// The part of the surcharge that is lent on tokens which sequences may still generate: texts begin
/// with tokens that are hard to guess, and who stops there falls behind, so that trying again costs
/// more every token than the surcharge on it.
const LENT: f64 = 0.0095;
/// Most tokens of a sequence on which it is lent.
const LENT_TOKENS: usize = 512;
/// Most of the time that probes take in the long run.
const PROBE_SHARE: f64 = 0.01;
/// Tokens before the first probe after drafting stopped to pay; each probe that does not pay
/// doubles the pause, until [`PROBE_SHARE`] allows no more than it does.
const FIRST_PAUSE: f64 = 1.0;

/// The account.
#[derive(Debug, Clone, Default)]
pub(super) struct Account {
    /// Seconds.
    balance: f64,
    /// Seconds that the balance may lie below zero.
    lent: f64,
    /// Seconds of plain decoding since a draft was last verified.
    since: f64,
    /// Probes without gain, one after another.
    failures: u32,
}

impl Account {
    /// Lends on the tokens that each of the sequences of a step may still generate, which take
    /// `plain_token` seconds each without drafts; what was lent before the step is no more.
    pub(super) fn lend(&mut self, left: impl Iterator<Item = usize>, plain_token: f64) {
        let tokens: usize = left.map(|left| left.min(LENT_TOKENS)).sum();
        self.lent = LENT * tokens as f64 * plain_token;
    }

    /// Whether a step may take `seconds` if it gives no more tokens than one of `plain` seconds.
    pub(super) fn allows(&self, seconds: f64, plain: f64) -> bool {
        self.balance + self.lent + plain * (1.0 + SURCHARGE) >= seconds
    }

    /// Whether it is time to spend `price` seconds on finding out whether drafting pays again.
    pub(super) fn probe_is_due(&self, price: f64, plain_token: f64) -> bool {
        let pause = match self.failures {
            0 => 0.0,
            failures => FIRST_PAUSE * plain_token * 2f64.powi(failures as i32 - 1),
        };
        self.since >= pause.min(price / PROBE_SHARE)
    }

    /// Books a step that took `seconds` and gave tokens that take `plain` seconds without drafts,
    /// and whether a drafter worked in it.
    pub(super) fn book(&mut self, seconds: f64, plain: f64, drafted: bool) {
        self.balance += plain * (1.0 + SURCHARGE) - seconds;
        if !drafted {
            self.since += plain;
            return;
        }
        self.since = 0.0;
        // Beyond a thousand doublings there is nothing to tell apart.
        self.failures = if plain > seconds { 0 } else { (self.failures + 1).min(1000) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_end_early_pay_their_debts() {
        // Of 512 tokens that each may generate it generates three, and drafts whenever it may, in vain.
        let (mut account, mut seconds) = (Account::default(), 0.0);
        let (answers, tokens) = (1000, 3);
        for left in (0..answers).flat_map(|_| (0..tokens).map(|done| 512 - done)) {
            account.lend(std::iter::once(left), 1.0);
            let drafts = account.allows(2.0, 1.0);
            let took = if drafts { 2.0 } else { 1.0 };
            account.book(took, 1.0, drafts);
            seconds += took;
        }
        let plain = (answers * tokens) as f64;
        assert!(seconds > plain, "it drafts at all");
        // The surcharge, and what one answer was lent.
        assert!(seconds <= plain * (1.0 + SURCHARGE) + LENT * 512.0, "{seconds} for {plain}");
    }
}
