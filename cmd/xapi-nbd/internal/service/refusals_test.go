package service

import (
	"testing"
)

// TestEveryRuleHasARemedy: every rule under which the service refuses has a remedy.
func TestEveryRuleHasARemedy(t *testing.T) {
	for rule, remedy := range remedies {
		if rule == "" || remedy == "" {
			t.Errorf("rule %q: remedy %q", rule, remedy)
		}
	}
}
