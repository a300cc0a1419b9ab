package main

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

const alertRules = "../../packaging/prometheus/xapi-nbd.rules.yml"

// The alert rules that are shipped ask for metrics that there are, and cover what an
// administrator has to hear of.
func TestAlertRules(t *testing.T) {
	data, err := os.ReadFile(alertRules)
	if err != nil {
		t.Fatal(err)
	}
	names := metricNames(t)
	asked := make(map[string]bool)
	alerts := strings.Split(string(data), "\n      - alert: ")[1:]
	for _, alert := range alerts {
		name, _, _ := strings.Cut(alert, "\n")
		expr := regexp.MustCompile(`(?m)^        expr: (.+)$`).FindStringSubmatch(alert)
		if expr == nil {
			t.Errorf("%s has no expression", name)
			continue
		}
		for _, part := range []string{"\n          severity: ", "\n          summary: \""} {
			if !strings.Contains(alert, part) {
				t.Errorf("%s lacks %q", name, strings.TrimSpace(part))
			}
		}
		for _, metric := range regexp.MustCompile(`xapi_nbd_\w+`).FindAllString(expr[1], -1) {
			metric = strings.TrimSuffix(metric, "_bucket")
			asked[metric] = true
			if !names[metric] {
				t.Errorf("%s asks for %s, which there is not", name, metric)
			}
		}
	}
	for _, metric := range []string{
		"xapi_nbd_xapi_up", "xapi_nbd_vbds_left_behind", "xapi_nbd_certificate_expiry_timestamp_seconds",
		"xapi_nbd_failed_requests_total", "xapi_nbd_refusals_total",
		"xapi_nbd_device_read_seconds", "xapi_nbd_device_read_stall_seconds",
	} {
		if !asked[metric] {
			t.Errorf("no rule asks for %s", metric)
		}
	}
	if !slices.ContainsFunc(alerts, func(alert string) bool { return strings.Contains(alert, "expr: up{") }) {
		t.Error("no rule notices that the service is down")
	}
	if strings.Contains(string(data), "\t") {
		t.Error("YAML allows no tabs")
	}
}

// promtool understands the rules; with the series of testdata/rules_test.yml each alert
// is raised when it should be, with its text, and not before.
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
