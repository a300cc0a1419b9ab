package service

import (
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

// TestMetricsLeftBehind: a VBD that is in use does not count as left behind.
func TestMetricsLeftBehind(t *testing.T) {
	attachments := []vdi.Status{{VBD: "b", Stage: "attached"}, {Stage: "creating"}}
	leftovers := []vdi.Leftover{{VBD: "c"}, {VDI: "d"}} // the VBD of the second one is not known
	if got := leftBehind([]string{"a", "b", "c"}, attachments, leftovers); got != 3 {
		t.Errorf("got %d, want 3", got)
	}
}

// TestOperationsNamesEveryMetric: every metric is explained.
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

// metricNames returns the names of all metrics of the service.
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

// constMetric is a collector of one metric.
type constMetric struct{ prometheus.Metric }

func (c constMetric) Describe(ch chan<- *prometheus.Desc) { ch <- c.Desc() }

func (c constMetric) Collect(ch chan<- prometheus.Metric) { ch <- c.Metric }

// TestMetricsReadLatency: the buckets of Prometheus are cumulative, those of package nbd are
// not.
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

// TestMetricsKnowAllMethods: every method that package xapi calls has series from the start.
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
