package service

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestGrafanaDashboard: the dashboard names only existing metrics, and all of the service's.
func TestGrafanaDashboard(t *testing.T) {
	data, err := os.ReadFile("../../../../packaging/grafana/xapi-nbd.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Title  string
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	names := metricNames(t)
	shown := make(map[string]bool)
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			found := regexp.MustCompile(`xapi_nbd_\w+`).FindAllString(target.Expr, -1)
			if len(found) == 0 {
				t.Errorf("panel %q asks for nothing of ours: %s", p.Title, target.Expr)
			}
			for _, name := range found {
				name = strings.TrimSuffix(name, "_bucket")
				shown[name] = true
				if !names[name] {
					t.Errorf("panel %q asks for %s, which there is not", p.Title, name)
				}
			}
		}
	}
	for name := range names {
		if !shown[name] {
			t.Errorf("no panel shows %s", name)
		}
	}
}

// TestAlertRules: the packaged alert rules name existing metrics, and there is one for each
// state that needs an administrator.
func TestAlertRules(t *testing.T) {
	data, err := os.ReadFile("../../../../packaging/prometheus/xapi-nbd.rules.yml")
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
