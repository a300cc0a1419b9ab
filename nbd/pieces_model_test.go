package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
)

const (
	modelSlice = 1 << 20 // of the disk, for each worker of a connection
	modelDepth = 4       // workers of a connection
)

// modelConns are the kinds of replies that the connections of TestMemoryPressure ask for.
var modelConns = []client.Config{{NoStructured: true}, {NoExtended: true}, {}}

// TestMemoryPressure has several connections with every kind of replies read and change one
// disk at random, with memory for few of the requests. Each worker has a part of the disk of
// its own.
func TestMemoryPressure(t *testing.T) {
	for _, budget := range []int64{1, 2 << 20} {
		t.Run(fmt.Sprint(budget), func(t *testing.T) {
			workers := len(modelConns) * modelDepth
			ram := nbdtest.NewRAM(make([]byte, workers*modelSlice))
			s := &nbd.Server{Limits: nbd.Limits{MaxInflightBytes: budget}, Exporter: &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
				"disk": func() (nbd.Device, error) { return ram.Again(), nil },
			}}}
			dial := nbdtest.Serve(t, s)
			var wg sync.WaitGroup
			for n, cfg := range modelConns {
				client, err := client.New(t.Context(), dial(), &cfg)
				if err != nil {
					t.Fatal(err)
				}
				conn, err := client.Go(t.Context(), "disk")
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				for w := range modelDepth {
					w += n * modelDepth
					wg.Go(func() {
						m := modelWorker{conn: conn, ram: ram, begin: int64(w * modelSlice), want: make([]byte, modelSlice), r: rand.New(rand.NewPCG(uint64(budget), uint64(w)))}
						for step := range 10 {
							if err := m.step(t.Context()); err != nil {
								t.Errorf("worker %d, step %d: %v", w, step, err)
								return
							}
						}
					})
				}
			}
			wg.Wait()
		})
	}
}

// modelWorker reads and changes a part of a disk.
type modelWorker struct {
	conn  *client.Conn
	ram   *nbdtest.RAM
	begin int64
	want  []byte // the content of the part
	r     *rand.Rand
}

// step makes one random request and checks its result.
func (m *modelWorker) step(ctx context.Context) error {
	off := m.r.IntN(modelSlice)
	n := 1 + m.r.IntN(modelSlice-off)
	part, at := m.want[off:off+n], m.begin+int64(off)
	fua := m.r.IntN(4) == 0
	switch m.r.IntN(5) {
	case 0, 1:
		nbdtest.Fill(part, at, m.r.Uint64())
		if err := m.conn.Write(ctx, part, at, fua); err != nil {
			return err
		}
	case 2:
		clear(part)
		if err := m.conn.WriteZeroes(ctx, at, int64(n), client.ZeroOptions{FUA: fua}); err != nil {
			return err
		}
	default:
		got := make([]byte, n)
		if err := m.conn.Read(ctx, got, at); err != nil {
			return err
		}
		if !bytes.Equal(got, part) {
			return errors.New("wrong data")
		}
		return nil
	}
	if fua && !bytes.Equal(m.ram.Stable()[at:at+int64(n)], part) {
		return errors.New("a change with FUA is not on stable storage")
	}
	return nil
}
