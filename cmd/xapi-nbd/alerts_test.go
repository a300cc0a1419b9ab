package main

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

const alertRules = "../../packaging/prometheus/xapi-nbd.rules.yml"

// TestAlertRulesWithPromtool: promtool accepts the rules. With the series of
// testdata/rules_test.yml it raises each alert, with its text, and not in the healthy case.
func TestAlertRulesWithPromtool(t *testing.T) {
	promtool := requires.Tool(t, "promtool")
	const tests = "testdata/rules_test.yml"
	for _, args := range [][]string{{"check", "rules", alertRules}, {"test", "rules", tests}} {
		if out, err := exec.CommandContext(t.Context(), promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
	rules, err := os.ReadFile(alertRules)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(tests)
	if err != nil {
		t.Fatal(err)
	}
	_, raised, _ := strings.Cut(string(text), "# Everything is wrong")
	for _, alert := range regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(string(rules), -1) {
		if !strings.Contains(raised, "alertname: "+alert[1]+"\n        exp_alerts:\n") {
			t.Errorf("%s has no test in which it is raised", alert[1])
		}
		if !strings.Contains(string(text), "alertname: "+alert[1]+", exp_alerts: []") {
			t.Errorf("%s has no test in which it is not raised", alert[1])
		}
	}
}
