package service

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"xapi-nbd/nbd"
	"xapi-nbd/vdi"
)

// A VBD that is in use is not left behind.
func TestMetricsLeftBehind(t *testing.T) {
	attachments := []vdi.Status{{VBD: "b", Stage: "attached"}, {Stage: "creating"}}
	leftovers := []vdi.Leftover{{VBD: "c"}, {VDI: "d"}} // of the second one xapi has not told the VBD
	if got := leftBehind([]string{"a", "b", "c"}, attachments, leftovers); got != 3 {
		t.Errorf("got %d, want 3", got)
	}
}

// Administrators find every metric explained.
func TestOperationsNamesEveryMetric(t *testing.T) {
	text := reference(t)
	rows := regexp.MustCompile("(?m)^\\| `(xapi_nbd_\\w+)`").FindAllStringSubmatch(text, -1)
	names := metricNames(t)
	for _, row := range rows {
		if !names[row[1]] {
			t.Errorf("%s is explained, and there is no such metric", row[1])
		}
		delete(names, row[1])
	}
	for name := range names {
		t.Errorf("there is no row about %s", name)
	}
}

// The dashboard asks for metrics that there are, and for all of ours.
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

// metricNames are the names of all our metrics.
func metricNames(t *testing.T) map[string]bool {
	t.Helper()
	s := &Service{health: new(health)}
	m := newMetrics(s, "127.0.0.1:0")
	descs := make(chan *prometheus.Desc, 100)
	for _, c := range []prometheus.Collector{m.calls, m.callTime, m.plugTime, &serviceCollector{s}} {
		c.Describe(descs)
	}
	close(descs)
	names := make(map[string]bool)
	for d := range descs {
		names[regexp.MustCompile(`fqName: "(\w+)"`).FindStringSubmatch(d.String())[1]] = true
	}
	return names
}

// The alert rules that are shipped ask for metrics that there are, and cover what an
// administrator has to hear of.
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

// constMetric is a collector of one metric.
type constMetric struct{ prometheus.Metric }

func (c constMetric) Describe(ch chan<- *prometheus.Desc) { ch <- c.Desc() }

func (c constMetric) Collect(ch chan<- prometheus.Metric) { ch <- c.Metric }

// The buckets of Prometheus count what is below their bounds as well, those of package
// nbd do not.
func TestMetricsReadLatency(t *testing.T) {
	l := nbd.ReadLatency{Counts: make([]int64, len(nbd.ReadLatencyBounds())+1), Sum: 1500 * time.Millisecond}
	for i := range l.Counts {
		l.Counts[i] = int64(i + 1) // 1 in the first one
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(constMetric{readLatency(l)})
	answer := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(answer, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	if missing := lacking(answer.Body.String(), []string{
		"\n# TYPE xapi_nbd_device_read_seconds histogram\n",
		"\nxapi_nbd_device_read_seconds_bucket{le=\"0.0001\"} 1\n", "\nxapi_nbd_device_read_seconds_bucket{le=\"0.00025\"} 3\n",
		"\nxapi_nbd_device_read_seconds_bucket{le=\"60\"} 171\n", "\nxapi_nbd_device_read_seconds_bucket{le=\"+Inf\"} 190\n",
		"\nxapi_nbd_device_read_seconds_sum 1.5\n", "\nxapi_nbd_device_read_seconds_count 190\n",
	}); missing != "" {
		t.Error(missing)
	}
}

// Every method of xapi that can be called has series from the start.
func TestMetricsKnowAllMethods(t *testing.T) {
	files, err := filepath.Glob("../../../../xapi/*.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("got %v, %v", files, err)
	}
	unused := slices.Clone(knownMethods)
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(`"((?:session|network|host|VM|VDI|VBD|SR|pool|PBD|task)\.\w+)"`).FindAllStringSubmatch(string(source), -1) {
			if !slices.Contains(knownMethods, match[1]) {
				t.Errorf("%s: %s has no series from the start", file, match[1])
			}
			unused = slices.DeleteFunc(unused, func(m string) bool { return m == match[1] })
		}
	}
	if len(unused) > 0 {
		t.Errorf("nothing calls %v", unused)
	}
}
