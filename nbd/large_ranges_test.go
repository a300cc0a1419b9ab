package nbd

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// vast is a device of 1 TiB that records the calls with their ranges.
type vast struct {
	mu    sync.Mutex
	calls []rangeCall
}

type rangeCall struct {
	What   string
	Off, N int64
}

const vastSize = 1 << 40

func (v *vast) Size() int64                            { return vastSize }
func (v *vast) ReadAt(p []byte, _ int64) (int, error)  { clear(p); return len(p), nil }
func (v *vast) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (v *vast) Close() error                           { return nil }
func (v *vast) BlockSizes() (minimum, preferred, maxPayload uint32) {
	return 512, 4096, 32 << 20
}

func (v *vast) Trim(off, n int64) error { return v.note("trim", off, n) }
func (v *vast) WriteZeroes(off, n int64, _, _ bool) error {
	return v.note("zero", off, n)
}

func (v *vast) Extents(off, n int64) ([]wire.Extent, error) {
	return []wire.Extent{{Length: uint64(n), Status: wire.StateHole | wire.StateZero}}, v.note("extents", off, n)
}

func (v *vast) note(what string, off, n int64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.calls = append(v.calls, rangeCall{what, off, n})
	return nil
}

// Ranges of 2 GiB and more, which become negative numbers in some servers, reach the device
// unchanged, up to the longest range that the kind of request can have; longer ones are
// several requests.
func TestLargeRanges(t *testing.T) {
	const almost4G = 1<<32 - 512
	const odd = 5<<30 + 512
	for name, cfg := range map[string]*client.Config{
		"compact":  {NoExtended: true, MetaContexts: []string{wire.BaseAllocation}},
		"extended": {MetaContexts: []string{wire.BaseAllocation}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				v := &vast{}
				s.serve(v)
				conn := connWith(t, s.connect().nc, "a", cfg)
				for _, r := range [][2]int64{{0, 1<<31 + 512}, {512, almost4G}, {vastSize - odd, odd}} {
					if err := conn.Trim(t.Context(), r[0], r[1], false); err != nil {
						t.Error(err)
					}
					if err := conn.WriteZeroes(t.Context(), r[0], r[1], client.ZeroOptions{}); err != nil {
						t.Error(err)
					}
					for off := r[0]; off < r[0]+r[1]; {
						got, err := conn.BlockStatus(t.Context(), wire.BaseAllocation, off, r[0]+r[1]-off)
						if err != nil {
							t.Fatal(err)
						}
						for _, e := range got {
							off += int64(e.Length)
						}
					}
					for _, what := range []string{"trim", "zero", "extents"} {
						if diff := cmp.Diff(wholeRange(v, what), rangeCall{what, r[0], r[1]}); diff != "" {
							t.Errorf("the device was asked (-) for another range than the client (+):\n%s", diff)
						}
					}
					v.calls = nil
				}
				for what, err := range map[string]error{
					"trim": conn.Trim(t.Context(), vastSize-almost4G+512, almost4G, false),
					"zero": conn.WriteZeroes(t.Context(), vastSize, 1<<31, client.ZeroOptions{}),
				} {
					if !errors.Is(err, wire.EINVAL) {
						t.Errorf("%s past the end: got error %v", what, err)
					}
				}
				if v.calls != nil {
					t.Errorf("past the end the device was asked for %v", v.calls)
				}
			})
		})
	}
}

// wholeRange joins the calls of one kind, which follow on from each other.
func wholeRange(v *vast, what string) (whole rangeCall) {
	for _, c := range v.calls {
		switch {
		case c.What != what:
		case whole.N == 0:
			whole = c
		case c.Off == whole.Off+whole.N:
			whole.N += c.N
		}
	}
	return whole
}
