package nbdtest_test

import (
	"errors"
	"fmt"
	"testing"

	"xapi-nbd/nbd/nbdtest"
)

func TestFaulty(t *testing.T) {
	errBad, errWorse := errors.New("bad"), errors.New("worse")
	f := nbdtest.NewFaulty(nbdtest.NewMem(4096, 1))
	f.Fail(1000, 10, errBad)
	f.Fail(500, 1, errWorse)
	f.Short(2000, 1)
	tests := []struct {
		off  int64
		n    int
		want int
		err  error
	}{
		{0, 500, 500, nil},
		{0, 501, 500, errWorse},
		{501, 499, 499, nil},
		{501, 500, 499, errBad},
		{1005, 1, 0, errBad},
		{1009, 100, 0, errBad},
		{1010, 100, 100, nil},
		{0, 4096, 500, errWorse},
		{1990, 20, 10, nil},
		{1990, 0, 0, nil},
	}
	for _, tt := range tests {
		p := make([]byte, tt.n)
		got, err := f.ReadAt(p, tt.off)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%d bytes at %d: got %d and error %v, want %d and %v", tt.n, tt.off, got, err, tt.want, tt.err)
		}
		if want := nbdtest.Bytes(got, tt.off, 1); string(p[:got]) != string(want) {
			t.Errorf("%d bytes at %d: wrong content", tt.n, tt.off)
		}
	}
	f.Heal()
	if n, err := f.ReadAt(make([]byte, 4096), 0); n != 4096 || err != nil {
		t.Errorf("healed: got %d and error %v, want all", n, err)
	}
}

func TestFaultyHold(t *testing.T) {
	f := nbdtest.NewFaulty(nbdtest.NewMem(4096, 1))
	arrived, release := f.Hold()
	const reads = 3
	done := make(chan error, reads)
	read := func() {
		n, err := f.ReadAt(make([]byte, 16), 0)
		if n != 16 {
			err = fmt.Errorf("got %d bytes and error %w, want 16", n, err)
		}
		done <- err
	}
	for range reads {
		go read()
	}
	for range reads {
		<-arrived
	}
	if len(done) != 0 {
		t.Errorf("%d reads did not wait", len(done))
	}
	if got := f.Device.(*nbdtest.Mem).Reads(); got != 0 {
		t.Errorf("%d reads reached the device, want 0", got)
	}
	release()
	release()
	for range reads {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	read() // nothing holds it
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestFaultyForwards(t *testing.T) {
	m := nbdtest.NewMem(512, 1)
	m.Min, m.Text = 512, "text"
	f := nbdtest.NewFaulty(m)
	if unit, _, _ := f.BlockSizes(); unit != 512 || f.Description() != "text" || f.Size() != 512 {
		t.Errorf("got minimum %d, text %q and size %d, want those of the device inside", unit, f.Description(), f.Size())
	}
	bare := nbdtest.NewFaulty(bareDevice{})
	if unit, _, _ := bare.BlockSizes(); unit != 0 || bare.Description() != "" {
		t.Errorf("got minimum %d and text %q of a device that has neither", unit, bare.Description())
	}
}

// bareDevice is only a device.
type bareDevice struct{}

func (bareDevice) ReadAt([]byte, int64) (int, error) { return 0, nil }
func (bareDevice) Size() int64                       { return 0 }
func (bareDevice) Close() error                      { return nil }
