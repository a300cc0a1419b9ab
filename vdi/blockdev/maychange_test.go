package blockdev

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
)

var errMayNot = errors.New("the device must not be changed any more")

// MayChange is asked before each system call that changes the content, also within one request.
// After it has refused nothing is changed, and the error is that of the request.
func TestEachCallAsksMayChange(t *testing.T) {
	for name := range changesOf(nil) {
		for allowed := range 3 {
			disk := newFaultDisk(rand.New(rand.NewPCG(1, 2)), 1<<20)
			d, _ := disk.open()
			made := 0
			d.io = watched{d.io, func() { made++ }}
			asked := 0
			d.mayChange = func() error {
				if asked++; asked > allowed {
					return errMayNot
				}
				return nil
			}
			before := disk.content()
			// An odd range that takes several calls, but for a trim.
			err := changesOf(d)[name](100, 700<<10)
			if made > allowed {
				t.Errorf("%s: %d calls, of which %d were allowed", name, made, allowed)
			}
			if asked > allowed && !errors.Is(err, errMayNot) || asked <= allowed && err != nil {
				t.Errorf("%s, asked %d times, allowed %d times: got %v", name, asked, allowed, err)
			}
			if allowed == 0 && !bytes.Equal(before, disk.content()) {
				t.Errorf("%s: the disk was changed after the refusal", name)
			}
		}
	}
}

// A write waits for another one in the same block. Meanwhile it is seen that the device must not
// be changed any more: the write fails and changes nothing.
func TestWriteThatWaitsForABlockAsksMayChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := newFaultDisk(rand.New(rand.NewPCG(3, 4)), 1<<16)
		want := disk.content()
		d, process := disk.open()
		refused := make(chan struct{})
		d.mayChange = func() error {
			select {
			case <-refused:
				return errMayNot
			default:
				return nil
			}
		}
		process.hold()
		first, second := make(chan error), make(chan error)
		go func() {
			_, err := d.WriteAt([]byte("first"), 3)
			first <- err
		}()
		synctest.Wait()
		go func() {
			_, err := d.WriteAt([]byte("second"), 103)
			second <- err
		}()
		synctest.Wait()
		close(refused)
		process.release()
		if err := <-first; err == nil { // interrupted calls are not repeated
			copy(want[3:], "first")
		}
		if err := <-second; !errors.Is(err, errMayNot) {
			t.Errorf("got %v, want the refusal", err)
		}
		if !bytes.Equal(disk.content(), want) {
			t.Error("the disk was changed after the refusal")
		}
	})
}
