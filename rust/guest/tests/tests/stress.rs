// SPDX-License-Identifier: GPL-2.0
//! Random operations, which src/bin/stress makes and checks, on the whole interface at once.

use std::env;
use uverbs_mmu_notify_tests::*;

/// How many, or UVERBS_STRESS_MINUTES says how long. Each run makes others; see src/bin/stress
/// for how to repeat one.
const OPERATIONS: &str = "9600";

/// G1: G2: G3: G4: G5: G8: each change is reported for each region that it concerns, nothing
/// else is reported as unmapped, and each event is read once and counted.
#[test]
fn random_operations() {
    let minutes = env::var("UVERBS_STRESS_MINUTES");
    let limit = match &minutes {
        Ok(minutes) => ["minutes", minutes],
        Err(_) => ["operations", OPERATIONS],
    };
    stress(&device(), &limit);
}
