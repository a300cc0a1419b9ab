package interop

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
	"xapi-nbd/vdi/allocation"
	"xapi-nbd/vdi/vhd"
	"xapi-nbd/vdi/vhd/vhdtest"
	"xapi-nbd/xapi/xapitest"
)

// imageChain is a disk in VHD images.
type imageChain struct {
	name    string
	paths   []string // the uppermost first
	content []byte
	blocks  []int64 // those that the service takes for data
}

// TestImages has readers of VHD by others read chains of images: those of test images of
// ours, and those of the simulated host before and after its garbage collector. libvhdi
// must read the content of the disk, with zeroes where the service sees a hole, and vhd-lib,
// Xen Orchestra's, must find the same blocks. The images have never been resized: libvhdi
// takes the size of before a resize.
func TestImages(t *testing.T) {
	requires.DirectIO(t, t.TempDir())
	chains := append(randomChains(t), hostChains(t)...)
	for i := range chains {
		chains[i].blocks = chains[i].read(t)
	}
	t.Run("libvhdi", func(t *testing.T) {
		python := requires.PythonModule(t, "pyvhdi")
		for _, c := range chains {
			out := filepath.Join(t.TempDir(), "content")
			said := runReader(t, exec.CommandContext(t.Context(), python, append([]string{"testdata/libvhdi.py", out}, c.paths...)...))
			if c.name == chains[0].name {
				t.Log(strings.TrimSpace(string(said)))
			}
			got, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, c.content) {
				t.Errorf("%s: libvhdi reads another content", c.name)
			}
			for block := range int64(len(got) / vhd.BlockSize) {
				part := got[block*vhd.BlockSize:][:vhd.BlockSize]
				if !slices.Contains(c.blocks, block) && bytes.Count(part, []byte{0}) != len(part) {
					t.Errorf("%s: block %d has data for libvhdi and is a hole", c.name, block)
				}
			}
		}
	})
	t.Run("vhd-lib", func(t *testing.T) {
		dir := vhdLibPackage.install(t)
		for _, c := range chains {
			said := runReader(t, exec.CommandContext(t.Context(), "node", append([]string{filepath.Join(dir, vhdLibPackage.script)}, c.paths...)...))
			var got []int64
			if err := json.Unmarshal(said, &got); err != nil {
				t.Fatalf("%s: %v in %s", c.name, err, said)
			}
			if !slices.Equal(got, c.blocks) {
				t.Errorf("%s: vhd-lib finds the blocks %d, the service %d", c.name, got, c.blocks)
			}
		}
	})
}

// vhdLibPackage is Xen Orchestra's library for VHD images. It is run, never linked.
var vhdLibPackage = npmPackage{
	name: "vhd-lib", version: "4.15.0", script: "vhdlib.cjs",
	needs: []string{
		"@vates/async-each@1.0.3", "@vates/read-chunk@1.2.1", "@xen-orchestra/async-map@0.1.4", "@xen-orchestra/log@0.7.2",
		"async-iterator-to-stream@1.2.0", "decorator-synchronized@0.6.0", "fs-extra@11.4.1", "limit-concurrency-decorator@0.6.0",
		"lodash@4.18.1", "promise-toolbox@0.21.0", "readable-stream@4.8.0", "struct-fu@1.2.1", "uuid@9.0.1",
	},
}

// runReader runs a command, which must succeed, and returns its standard output.
func runReader(t *testing.T, cmd *exec.Cmd) []byte {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd.Path, err, stderr.String())
	}
	return out
}

// read returns the blocks that the service takes for data.
func (c imageChain) read(t *testing.T) (blocks []int64) {
	t.Helper()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(c.paths[0], link); err != nil {
		t.Fatal(err)
	}
	key, _ := strings.CutSuffix(filepath.Base(c.paths[0]), ".vhd")
	set, err := allocation.Read(t.Context(), allocation.Source{Link: link, Key: key, MapperDir: filepath.Dir(link), Size: int64(len(c.content))})
	if err != nil {
		t.Fatalf("%s: %v", c.name, err)
	}
	for block := range set.Size() / vhd.BlockSize {
		if in, _ := set.Run(block*vhd.BlockSize, 1); in {
			blocks = append(blocks, block)
		}
	}
	return blocks
}

const chainBlocks = 12 // of 2 MiB, in each disk

// randomChains makes chains of 1 to 5 images with some sectors of random data in each.
func randomChains(t *testing.T) (chains []imageChain) {
	t.Helper()
	const seed, count = 1, 10
	random := rand.New(rand.NewPCG(seed, seed))
	for n := range count {
		dir, c := t.TempDir(), imageChain{name: fmt.Sprintf("random chain %d", n)}
		c.content = make([]byte, chainBlocks*vhdtest.BlockSize)
		o := vhdtest.Options{Size: chainBlocks * vhdtest.BlockSize, ReservedEntries: chainBlocks + random.IntN(5000)}
		for layer := range 1 + n%5 {
			// vhd-lib wants UUIDs of RFC 9562.
			o.UUID, o.Hidden = [16]byte{0: byte(n), 1: byte(layer), 6: 0x40, 8: 0x80}, layer < n%5
			path := filepath.Join(dir, fmt.Sprintf("layer%d.vhd", layer))
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			img, err := vhdtest.Create(f, o)
			for range random.IntN(6) {
				data := randomBytes(random.Uint64(), 512*(1+random.IntN(100)))
				off := 512 * random.Int64N(int64(len(c.content)-len(data))/512+1)
				copy(c.content[off:], data)
				if err == nil {
					err = img.WriteSectors(data, off)
				}
			}
			if err := errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
			c.paths = slices.Insert(c.paths, 0, path)
			o.Differencing, o.ParentUUID, o.ParentName = true, o.UUID, filepath.Base(path)
		}
		chains = append(chains, c)
	}
	return chains
}

// hostChains are the chains of a VDI of the simulated host with three snapshots, of which
// one is deleted: of the VDI and of a snapshot, before and after the garbage collector.
func hostChains(t *testing.T) (chains []imageChain) {
	t.Helper()
	h, err := xapitest.Start(xapitest.Config{Dir: t.TempDir(), Style: xapitest.StyleNBD})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	live, err := h.AddVDI(xapitest.VDISpec{Size: chainBlocks * vhdtest.BlockSize, VHD: true})
	if err != nil {
		t.Fatal(err)
	}
	var snapshots []string
	for i := range 4 {
		for block := range int64(3) {
			off := ((block*5+int64(i)*3)%chainBlocks)*vhdtest.BlockSize + int64(i)*4096
			if err := h.WriteVDI(live, randomBytes(uint64(16*i)+uint64(block), 8192), off); err != nil {
				t.Fatal(err)
			}
		}
		if i == 3 {
			break
		}
		uuid, err := h.SnapshotVDI(live)
		if err != nil {
			t.Fatal(err)
		}
		snapshots = append(snapshots, uuid)
	}
	for _, when := range []string{"before", "after"} {
		if when == "after" {
			if err := errors.Join(h.DestroyVDI(snapshots[1]), h.CollectGarbage()); err != nil {
				t.Fatal(err)
			}
		}
		for name, uuid := range map[string]string{"VDI": live, "snapshot": snapshots[0]} {
			chains = append(chains, hostChain(t, h, uuid, name+" "+when+" the garbage collector"))
		}
	}
	return chains
}

// hostChain copies a chain of the host, which goes on working on it.
func hostChain(t *testing.T, h *xapitest.Host, uuid, name string) imageChain {
	t.Helper()
	c, dir := imageChain{name: name}, t.TempDir()
	var err error
	if c.content, err = os.ReadFile(h.ImagePath(uuid)); err != nil {
		t.Fatal(err)
	}
	for _, path := range h.Chain(uuid) {
		data, err := os.ReadFile(path)
		if err == nil {
			c.paths = append(c.paths, filepath.Join(dir, filepath.Base(path)))
			err = os.WriteFile(c.paths[len(c.paths)-1], data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return c
}
