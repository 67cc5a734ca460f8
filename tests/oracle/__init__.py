"""Two oracles for the merge: PEFT itself, and a plain float64 restatement of its formulas."""
