package allocation

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"xapi-nbd/vdi/vhd"
)

// hangingFiles is a world whose last image can be read once hang is closed. It counts open
// files.
type hangingFiles struct {
	*world
	hang    chan struct{}
	opened  atomic.Int64 // ever
	current atomic.Int64 // at present
}

func newHangingFiles(t *testing.T) *hangingFiles {
	return &hangingFiles{world: stillWorld(t), hang: make(chan struct{})}
}

type hangingFile struct {
	file
	of   *hangingFiles
	last bool
}

func (h *hangingFiles) open(path string) (file, error) {
	f, err := h.world.open(path)
	if err != nil {
		return nil, err
	}
	h.opened.Add(1)
	h.current.Add(1)
	return hangingFile{f, h, path == modelDir+"/base2.vhd"}, nil
}

func (f hangingFile) ReadAt(p []byte, off int64) (int, error) {
	if f.last {
		<-f.of.hang
	}
	return f.file.ReadAt(p, off)
}

func (f hangingFile) Close() error {
	f.of.current.Add(-1)
	return f.file.Close()
}

// TestStorageHangs has a read that does not return in time. The images are closed when it
// returns.
func TestStorageHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := newHangingFiles(t)
		_, err := readInTime(t.Context(), files, modelSource(), make(chan struct{}, 1))
		if got := Reason(err); !errors.Is(err, ErrUnknown) || got != "timeout" {
			t.Errorf("got %v with the reason %q, want timeout", err, got)
		}
		close(files.hang)
		synctest.Wait()
		if files.current.Load() != 0 {
			t.Errorf("%d images are open", files.current.Load())
		}
	})
}

// TestReadsThatHangAreBounded: a further read does not begin, and ends in time.
func TestReadsThatHangAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files, slots := newHangingFiles(t), make(chan struct{}, 2)
		opened := int64(0)
		for i := range 4 {
			_, err := readInTime(t.Context(), files, modelSource(), slots)
			if Reason(err) != "timeout" {
				t.Errorf("read %d: got %v, want the reason timeout", i, err)
			}
			if i == 1 {
				opened = files.opened.Load()
			}
		}
		if files.opened.Load() != opened {
			t.Errorf("%d images were opened beside the two reads that hang", files.opened.Load()-opened)
		}
		close(files.hang)
		synctest.Wait()
		if _, err := readInTime(t.Context(), files, modelSource(), slots); err != nil {
			t.Errorf("after the end of the reads that hung: %v", err)
		}
	})
}

// TestCanceledReadClosesImages: who ends a read may rely on that the images are closed
// when it returns.
func TestCanceledReadClosesImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := newHangingFiles(t)
		ctx, cancel := context.WithCancel(t.Context())
		returned := make(chan error, 1)
		go func() {
			_, err := readInTime(ctx, files, modelSource(), make(chan struct{}, 1))
			returned <- err
		}()
		synctest.Wait()
		cancel()
		synctest.Wait()
		select {
		case err := <-returned:
			t.Errorf("%d images are open after the end of the read: %v", files.current.Load(), err)
		default:
		}
		close(files.hang)
		if err := <-returned; Reason(err) != "timeout" || files.current.Load() != 0 {
			t.Errorf("got %v and %d open images, want the reason timeout and none", err, files.current.Load())
		}
	})
}

func TestCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	set, err := readInTime(ctx, stillWorld(t), modelSource(), make(chan struct{}, 1))
	if !errors.Is(err, ErrUnknown) || Reason(err) != "timeout" || set != (*vhd.BlockSet)(nil) {
		t.Errorf("got %v, want an ErrUnknown", err)
	}
}
