package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// fio reads blocks at random until time is up, the same blocks in the same
// order from every server. Rates and latencies are fio's own, which leave out
// its start.
func (b *bench) fio(ctx context.Context, s *server, size int64, depth int) (sample, error) {
	file := filepath.Join(b.dir, "fio.json") // what is printed has other lines between
	argv := []string{
		b.programs["fio"], "--name=random", "--ioengine=nbd", "--uri=" + s.uri(s.addr),
		"--rw=randread", "--randrepeat=1", fmt.Sprintf("--bs=%d", size), fmt.Sprintf("--iodepth=%d", depth),
		"--time_based", fmt.Sprintf("--runtime=%dms", b.opts.runFor.Milliseconds()),
		"--output-format=json", "--output=" + file,
	}
	b.log.note(clientCommand, b.shown(argv, s.port))
	if _, err := b.client(ctx, argv); err != nil {
		return sample{}, err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return sample{}, err
	}
	return parseFio(text)
}

// fioOutput is the part of fio's JSON that is of interest.
type fioOutput struct {
	Jobs []struct {
		Error int
		Read  struct {
			Bytes   int64   `json:"io_bytes"`
			Reads   int64   `json:"total_ios"`
			Runtime float64 `json:"runtime"` // milliseconds
			Latency struct {
				Mean float64 `json:"mean"`
			} `json:"lat_ns"`
			Completion struct {
				Percentile map[string]float64 `json:"percentile"`
			} `json:"clat_ns"`
		} `json:"read"`
	} `json:"jobs"`
}

func parseFio(text []byte) (sample, error) {
	var o fioOutput
	if err := json.Unmarshal(text, &o); err != nil {
		return sample{}, fmt.Errorf("fio's output: %w", err)
	}
	if len(o.Jobs) != 1 || o.Jobs[0].Error != 0 || o.Jobs[0].Read.Reads == 0 || o.Jobs[0].Read.Runtime == 0 {
		return sample{}, errors.New("fio's output: no job that has read without error")
	}
	r := o.Jobs[0].Read
	return sample{
		Bytes: r.Bytes, Reads: r.Reads, Seconds: r.Runtime / 1e3, Mean: r.Latency.Mean / 1e3,
		P50: r.Completion.Percentile["50.000000"] / 1e3,
		P99: r.Completion.Percentile["99.000000"] / 1e3,
	}, nil
}
