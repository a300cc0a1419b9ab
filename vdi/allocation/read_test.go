package allocation

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"testing/synctest"
)

// schedules is how many interleavings TestHolesAreCertain runs: SOAK_SCHEDULES, or
// enough to meet every kind of step at every moment.
func schedules(t *testing.T) uint64 {
	if s := os.Getenv("SOAK_SCHEDULES"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("SOAK_SCHEDULES: %v", err)
		}
		return n
	}
	return 5000
}

// TestHolesAreCertain interleaves reading with the steps of the garbage collector: a
// block that has data is never a hole.
func TestHolesAreCertain(t *testing.T) {
	n, known := schedules(t), uint64(0)
	synctest.Test(t, func(t *testing.T) { // the pauses between attempts take no time
		for seed := range n {
			if readWorld(t, seed, false) {
				known++
			}
		}
	})
	t.Logf("%d of %d maps were known", known, n)
	if known < n/2 {
		t.Errorf("only %d of %d maps are known: too many doubts", known, n)
	}
}

// TestMapIsExact reads chains that nobody changes: every block without data is a hole.
func TestMapIsExact(t *testing.T) {
	for seed := range uint64(500) {
		readWorld(t, seed, true)
	}
}

// TestEachChangeBetweenAnyTwoCalls lets one whole piece of work of the collector happen
// before each of the reader's system calls. Reading once more is enough then, so the map is
// known, and it is right.
func TestEachChangeBetweenAnyTwoCalls(t *testing.T) {
	changes := map[string]func(*world, func(string)){
		"coalesce": (*world).coalesce, "leaf-coalesce": (*world).leafCoalesce, "snapshot": (*world).snapshot,
		"grow": (*world).grow, "move blocks": (*world).moveBlocks,
	}
	for name, change := range changes {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // the pauses between attempts take no time
				for seed := range uint64(20) {
					for call, happened := 1, true; happened; call++ {
						w := newWorld(t, seed)
						happened = false
						w.atCall = func(now int) {
							if now == call {
								happened = true
								change(w, func(string) {})
							}
						}
						set, err := read(t.Context(), w, modelSource())
						if err != nil {
							t.Fatalf("seed %d, before call %d: %v", seed, call, err)
						}
						w.checkMap(set, fmt.Sprintf("seed %d, before call %d", seed, call), false)
					}
				}
			})
		})
	}
}
