package mirror

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
)

// interleaving is two writes and one copy of three granules, of which the test decides each
// step: the begin, and for each operation of a device when it is carried out and when it
// returns.
type interleaving struct {
	t      *testing.T
	mode   Mode
	writes [2][2]int64 // begin and end

	ends    [2]*simDevice
	m       *Mirror
	stop    context.CancelFunc
	ran     chan error
	begun   [2]bool
	copied  bool
	results chan error
	left    int
}

func (r *interleaving) start() {
	const size = 3 * modelGranule
	data, other := bytes.Repeat([]byte{1}, size), bytes.Repeat([]byte{2}, size)
	dirty := func(yield func(off, n int64) bool) { yield(0, size) }
	if r.mode == Blocking {
		// Only the granule in the middle differs.
		other = slices.Concat(data[:modelGranule], other[:modelGranule], data[:modelGranule])
		dirty = func(yield func(off, n int64) bool) { yield(modelGranule, modelGranule) }
	}
	r.ends[primary] = newSimDevice(r.t, "primary", rand.New(rand.NewPCG(0, 0)), 1, data)
	r.ends[secondary] = newSimDevice(r.t, "secondary", rand.New(rand.NewPCG(0, 0)), 1, other)
	m, err := New(Config{
		Primary: r.ends[primary], Secondary: r.ends[secondary], Dirty: dirty, Requests: 1,
		granule: modelGranule, copySize: size,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	m.t.mode = r.mode
	m.Pause()
	r.m, r.begun, r.copied, r.results, r.left = m, [2]bool{}, false, make(chan error, 2), 0
	ctx, stop := context.WithCancel(r.t.Context())
	r.stop, r.ran = stop, make(chan error, 1)
	go func() { r.ran <- m.Run(ctx) }()
	synctest.Wait()
}

func (r *interleaving) end() {
	for _, d := range r.ends {
		d.kill(false)
	}
	r.stop()
	<-r.ran
	for ; r.left > 0; r.left-- {
		<-r.results
	}
}

// action is a step that is possible now.
type action struct {
	name string
	do   func()
}

func (r *interleaving) actions() []action {
	var all []action
	for i, w := range r.writes {
		if !r.begun[i] {
			all = append(all, action{fmt.Sprint("begin write ", i), func() {
				r.begun[i] = true
				r.left++
				p := bytes.Repeat([]byte{byte(3 + i)}, int(w[1]-w[0]))
				go func() { r.results <- r.m.WriteAt(r.t.Context(), p, w[0]) }()
			}})
		}
	}
	if !r.copied {
		all = append(all, action{"begin the copy", func() {
			r.copied = true
			r.m.Resume()
			synctest.Wait()
			r.m.Pause()
		}})
	}
	for _, d := range r.ends {
		for _, o := range d.pending {
			if o.applied {
				all = append(all, action{fmt.Sprintf("%v %v returns", o, o.p), func() { d.finish(o, nil) }})
			} else {
				all = append(all, action{fmt.Sprintf("%v %v is carried out", o, o.p), func() { d.carryOut(o) }})
			}
		}
	}
	slices.SortFunc(all, func(a, b action) int { return strings.Compare(a.name, b.name) })
	return all
}

// key stands for the whole state: what follows depends on nothing else.
func (r *interleaving) key(actions []action) string {
	var b strings.Builder
	for _, a := range actions {
		b.WriteString(a.name)
	}
	t := r.m.t
	fmt.Fprint(&b, [][]byte{r.ends[0].data, r.ends[1].data}, t.dirty.words, t.mode, t.cursor, t.taken, t.left, t.stagnant)
	var ops []string
	for o := range t.ops {
		ops = append(ops, fmt.Sprint(o.kind, o.begin, o.end))
	}
	slices.Sort(ops)
	fmt.Fprint(&b, ops, len(r.results))
	return b.String()
}

// explore visits every state that any order of the steps leads to, and returns how many there
// are.
func (r *interleaving) explore() int {
	visited := make(map[string]bool)
	todo := [][]int{nil}
	for len(todo) > 0 {
		path := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		r.start()
		var trace []string
		for i := 0; ; i++ {
			if err := violation(r.m, r.ends); err != nil {
				r.end()
				r.t.Fatalf("mode %v, writes %v: %v, after\n%s", r.mode, r.writes, err, strings.Join(trace, "\n"))
			}
			actions := r.actions()
			if i >= len(path) {
				key := r.key(actions)
				if visited[key] || len(actions) == 0 {
					visited[key] = true
					break
				}
				visited[key] = true
				for other := 1; other < len(actions); other++ {
					todo = append(todo, append(slices.Clone(path), other))
				}
				path = append(path, 0)
			}
			a := actions[path[i]]
			trace = append(trace, a.name)
			a.do()
			synctest.Wait()
		}
		answered := len(r.m.t.ops) > 0 || r.left == len(r.results)
		r.end()
		if !answered {
			r.t.Fatalf("mode %v, writes %v: a write was not answered, after\n%s", r.mode, r.writes, strings.Join(trace, "\n"))
		}
	}
	return len(visited)
}

// TestInterleavings: the invariant is true in every state that any order of the steps of two
// writes and one copy of three granules leads to, for writes that cover granules and parts of
// them, side by side, overlapping and equal.
func TestInterleavings(t *testing.T) {
	const half = modelGranule / 2
	places := [][2]int64{{0, 2 * half}, {half, 3 * half}, {2 * half, 4 * half}, {5 * half / 2, 7 * half / 2}, {0, 6 * half}, {3 * half, 6 * half}}
	if testing.Short() {
		places = places[1:4]
	}
	for _, mode := range []Mode{Background, Blocking} {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				states := 0
				for i, first := range places {
					for _, second := range places[i:] {
						r := &interleaving{t: t, mode: mode, writes: [2][2]int64{first, second}}
						states += r.explore()
					}
				}
				t.Log(states, "states")
			})
		})
	}
}
