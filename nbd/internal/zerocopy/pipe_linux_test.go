package zerocopy

import (
	"errors"
	"io"
	"os"
	"testing"
)

func TestFillFails(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var l Pipes
	// A pipe has no offsets, so nothing can be spliced at one.
	if err := l.fill(int(r.Fd()), 0, 4096); err == nil {
		t.Error("a pipe was read at an offset")
	}
	if len(l.pipes) != 0 || l.n != 0 {
		t.Errorf("Pipes holds %d pipes and %d bytes", len(l.pipes), l.n)
	}
	if err := l.fill(-1, 0, 4096); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a descriptor that is none: got %v", err)
	}
}

func TestEmptyPipesAreReused(t *testing.T) {
	p, err := getPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.release()
	q, err := getPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p != q {
		t.Error("an empty pipe was not reused")
	}
	q.n = 1 // as if data were left in it
	q.release()
	if r, err := getPipe(); err != nil || r == q {
		t.Errorf("got the pipe again although data is left in it (%v)", err)
	} else {
		r.release()
	}
}
