package nbdtest_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"xapi-nbd/nbd/nbdtest"
)

func TestFaultyRAM(t *testing.T) {
	errBad := errors.New("bad")
	r := nbdtest.NewRAM(nbdtest.Bytes(4096, 0, 1))
	f := nbdtest.NewFaultyRAM(r)
	f.Fail(1024, 1, errBad)
	if n, err := f.WriteAt(make([]byte, 2048), 512); n != 512 || !errors.Is(err, errBad) {
		t.Errorf("WriteAt: got %d and error %v, want 512 and that", n, err)
	}
	if n, err := f.ReadAt(make([]byte, 2048), 1024); n != 0 || !errors.Is(err, errBad) {
		t.Errorf("ReadAt: got %d and error %v, want 0 and that", n, err)
	}
	for name, err := range map[string]error{
		"Trim": f.Trim(1000, 100), "WriteZeroes": f.WriteZeroes(0, 4096, false, true), "Cache": f.Cache(1024, 1),
	} {
		if !errors.Is(err, errBad) {
			t.Errorf("%s: got error %v, want that", name, err)
		}
	}
	if extents, err := f.Extents(0, 4096); extents != nil || !errors.Is(err, errBad) {
		t.Errorf("Extents: got %v and error %v, want none and that", extents, err)
	}
	want := nbdtest.Bytes(4096, 0, 1)
	clear(want[:1024])
	if !bytes.Equal(r.Content(), want) {
		t.Error("the bytes before the fault were not written, or bytes behind it were")
	}

	f.FailFlush(io.ErrShortWrite)
	if err := f.Flush(); !errors.Is(err, io.ErrShortWrite) || r.Calls().Flushes != 0 {
		t.Errorf("Flush: got error %v and %d flushes, want that and none", err, r.Calls().Flushes)
	}
	f.FailFlush(nil)
	f.Heal()
	if err := errors.Join(f.Flush(), f.Trim(1000, 100), f.WriteZeroes(0, 4096, false, true)); err != nil || r.Calls().Flushes != 1 {
		t.Errorf("healed: got error %v and %d flushes, want none and one", err, r.Calls().Flushes)
	}
}

func TestFaultyRAMHold(t *testing.T) {
	r := nbdtest.NewRAM(make([]byte, 4096))
	f := nbdtest.NewFaultyRAM(r)
	arrived, release := f.Hold()
	done := make(chan error)
	calls := []func() error{f.Flush, func() error { return f.Trim(0, 1) }, func() error {
		_, err := f.WriteAt([]byte("x"), 0)
		return err
	}}
	for _, call := range calls {
		go func() { done <- call() }()
		<-arrived
	}
	if got := r.Calls(); got != (nbdtest.RAMCalls{}) {
		t.Errorf("got calls %+v while they are held", got)
	}
	release()
	for range calls {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
