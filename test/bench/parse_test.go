package main

import (
	"strings"
	"testing"
)

func TestParseFio(t *testing.T) {
	const text = `{"fio version": "fio-3.33", "jobs": [{"jobname": "random", "error": 0, "read": {
		"io_bytes": 40960, "total_ios": 10, "runtime": 500, "iops": 20.1,
		"lat_ns": {"mean": 12500.5}, "clat_ns": {"mean": 11000, "percentile": {"50.000000": 9000, "99.000000": 30000}}}}]}`
	got, err := parseFio([]byte(text))
	want := sample{Bytes: 40960, Reads: 10, Seconds: 0.5, Mean: 12.5005, P99: 30}
	if err != nil || got != want {
		t.Errorf("got %+v, error %v, want %+v", got, err, want)
	}
	for name, text := range map[string]string{
		"not JSON":   "fio: connected",
		"no job":     `{"jobs": []}`,
		"failed job": strings.Replace(text, `"error": 0`, `"error": 5`, 1),
		"no reads":   strings.Replace(text, `"total_ios": 10`, `"total_ios": 0`, 1),
	} {
		if got, err := parseFio([]byte(text)); err == nil {
			t.Errorf("%s: got %+v, want an error", name, got)
		}
	}
}

func TestProcFields(t *testing.T) {
	got := procFields("Name:\tbench\nVmHWM:\t    2048 kB\nVmRSS:\t1024 kB\nThreads:\t5\n")
	if len(got) != 2 || got["VmHWM"] != 2<<20 || got["VmRSS"] != 1<<20 {
		t.Errorf("got %v", got)
	}
}
