package xapitest

import (
	"fmt"
	"io"
	"os"
	"testing"
)

func TestResizeVDI(t *testing.T) {
	for name, cfg := range map[string]Config{"file": {}, "loop": {Loop: true}, "shared loop": {Loop: true, Style: StyleSM}} {
		t.Run(name, func(t *testing.T) {
			if cfg.Loop {
				requireLoop(t)
			}
			h := start(t, cfg)
			uuid := addVDI(t, h, VDISpec{})
			s := h.NewSession(RoleRoot)
			vdi := mustString(t, h, "VDI.get_by_uuid", s, uuid)
			files := []*os.File{openDevice(t, h, plugOf(t, h, uuid)), openDevice(t, h, plugOf(t, h, uuid))}
			for _, size := range []int64{2 << 20, 512} {
				if err := h.ResizeVDI(uuid, size); err != nil {
					t.Fatal(err)
				}
				if got := must(t, h, "VDI.get_virtual_size", s, vdi); got != fmt.Sprint(size) {
					t.Errorf("virtual_size: got %v, want %d", got, size)
				}
				for _, f := range files {
					if got, err := f.Seek(0, io.SeekEnd); err != nil || got != size {
						t.Errorf("device: got %d, %v, want %d", got, err, size)
					}
				}
			}
			for _, f := range files {
				_ = f.Close()
			}
		})
	}
}

func TestResizeVDIRefusals(t *testing.T) {
	h := start(t, Config{})
	uuid := addVDI(t, h, VDISpec{})
	wantError(t, "unknown", h.ResizeVDI("x", 512), "no such VDI")
	wantError(t, "negative", h.ResizeVDI(uuid, -1), "invalid argument")
	if err := h.ResizeVDI(uuid, 1000); err != nil {
		t.Errorf("without a loop device: got %v", err)
	}

	requireLoop(t)
	h = start(t, Config{Loop: true})
	uuid = addVDI(t, h, VDISpec{SectorSize: 4096})
	plugOf(t, h, uuid)
	wantError(t, "tail", h.ResizeVDI(uuid, 4096+512), "drop the last 512 bytes")
	if fi, err := os.Stat(h.ImagePath(uuid)); err != nil || fi.Size() != 1<<20 {
		t.Errorf("the image after a refusal: got %v, %v", fi, err)
	}
}
