package main

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
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
			asked[metric] = true
			if !names[metric] {
				t.Errorf("%s asks for %s, which there is not", name, metric)
			}
		}
	}
	for _, metric := range []string{
		"xapi_nbd_xapi_up", "xapi_nbd_vbds_left_behind", "xapi_nbd_certificate_expiry_timestamp_seconds",
		"xapi_nbd_failed_requests_total", "xapi_nbd_refusals_total",
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
	if promtool, err := exec.LookPath("promtool"); err == nil {
		if out, err := exec.CommandContext(t.Context(), promtool, "check", "rules", alertRules).CombinedOutput(); err != nil {
			t.Errorf("promtool: %v\n%s", err, out)
		}
	}
}
