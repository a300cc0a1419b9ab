package allocation

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"xapi-nbd/vdi/vhd"
	"xapi-nbd/vdi/vhd/vhdtest"
)

// The model test interleaves Read with the steps of SM's garbage collector. Which block
// of the disk has data is fixed when the images are made, because Read is only used for
// frozen content; every step of the collector keeps that content.

const (
	modelBlocks = 12
	modelDir    = "/sr"
	mapperDir   = "/mapper"
	modelLink   = "/dev/sm/phy/sr/vdi"
	leafName    = "vdi.vhd"
)

// node is one image of the model.
type node struct {
	name    string
	uuid    [16]byte
	storage *vhdtest.Memory
	writer  *vhdtest.Image
	parent  *node
	ino     uint64
}

// world is a folder of images and the collector that works on them.
type world struct {
	t      *testing.T
	rand   *rand.Rand
	files  map[string]*node
	leaf   *node
	target string // of SM's link; "" while there is none
	data   [modelBlocks]bool
	nextID uint64

	// steps runs the collector as a coroutine: each call of next runs it up to its
	// next write.
	next func() bool
	busy bool // whether the collector has anything left to do
	log  []string

	// atCall, if set, is called instead before each system call, with its number from 1.
	atCall func(call int)
	calls  int
}

// newWorld makes a chain of 1 to 5 images, some of which end before the disk does.
func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, rand: rand.New(rand.NewPCG(seed, 1)), files: map[string]*node{}, target: modelDir + "/" + leafName}
	size := int64(modelBlocks)
	sizes := []int64{size}
	for range w.rand.IntN(5) {
		if w.rand.IntN(3) == 0 {
			size = 1 + w.rand.Int64N(size)
		}
		sizes = append(sizes, size)
	}
	var parent *node
	for i, blocks := range slices.Backward(sizes) {
		name := leafName
		if i > 0 {
			name = fmt.Sprintf("base%d.vhd", i)
		}
		parent = w.create(name, parent, blocks, i > 0)
		for b := range blocks {
			if w.rand.IntN(4) == 0 {
				w.check(parent.writer.AddBlock(b, []byte{1}, func() {}))
				w.data[b] = true
			}
		}
	}
	w.leaf = parent
	return w
}

func (w *world) check(err error) {
	if err != nil {
		w.t.Helper()
		w.t.Fatal(err)
	}
}

// create makes an image of so many blocks.
func (w *world) create(name string, parent *node, blocks int64, hidden bool) *node {
	w.nextID++
	n := &node{name: name, parent: parent, storage: &vhdtest.Memory{}, ino: w.nextID, uuid: [16]byte{byte(w.nextID), 1}}
	// A table for the whole disk: the image may grow.
	o := vhdtest.Options{Size: blocks * vhd.BlockSize, OriginalSize: vhd.BlockSize, UUID: n.uuid, Hidden: hidden, ReservedEntries: modelBlocks}
	if parent != nil {
		o.Differencing, o.ParentUUID, o.ParentName = true, parent.uuid, parent.name
	}
	var err error
	n.writer, err = vhdtest.Create(n.storage, o)
	w.check(err)
	w.files[name] = n
	return n
}

// collect does some work of the collector and of others: coalesce, leaf-coalesce, snapshot, resize
// and moving blocks, in any order. yield is called before each step that others can see.
func (w *world) collect(yield func(step string)) {
	for range 1 + w.rand.IntN(4) {
		switch w.rand.IntN(6) {
		case 0, 1:
			w.coalesce(yield)
		case 2:
			w.leafCoalesce(yield)
		case 3:
			w.snapshot(yield)
		case 4:
			w.grow(yield)
		case 5:
			w.moveBlocks(yield)
		}
	}
}

// ancestors returns the images below the leaf.
func (w *world) ancestors() []*node {
	var found []*node
	for n := w.leaf.parent; n != nil; n = n.parent {
		found = append(found, n)
	}
	return found
}

// coalesce merges a base copy into its parent and deletes it.
func (w *world) coalesce(yield func(string)) {
	var candidates []*node
	for _, n := range w.ancestors() {
		if n.parent != nil {
			candidates = append(candidates, n)
		}
	}
	if len(candidates) == 0 {
		return
	}
	x := candidates[w.rand.IntN(len(candidates))]
	p := x.parent
	child := w.leaf
	for child.parent != x {
		child = child.parent
	}
	w.fit(p, x, yield)
	w.copyBlocks(x, p, yield)
	w.check(child.writer.SetParent(p.uuid, p.name, func() { yield("relink " + child.name + " to " + p.name) }))
	child.parent = p
	w.remove(x, yield)
}

// leafCoalesce merges the leaf into its parent, which takes over its name.
func (w *world) leafCoalesce(yield func(string)) {
	old, p := w.leaf, w.leaf.parent
	if p == nil {
		return
	}
	w.fit(p, old, yield)
	w.copyBlocks(old, p, yield)
	yield("rename the leaf to OLD")
	delete(w.files, old.name)
	old.name = "OLD_" + leafName
	w.files[old.name] = old
	yield("rename the parent to the leaf")
	delete(w.files, p.name)
	p.name = leafName
	w.files[p.name] = p
	yield("unhide the new leaf")
	w.check(p.writer.SetHidden(false))
	w.leaf = p
	w.remove(old, yield)
}

// remove deletes an image. Its storage is used for another image then: the host that
// deletes a logical volume does not know who else has it open.
func (w *world) remove(n *node, yield func(string)) {
	yield("delete " + n.name)
	delete(w.files, n.name)
	yield("use the storage of " + n.name + " again")
	_, err := vhdtest.Create(n.storage, vhdtest.Options{Size: modelBlocks * vhd.BlockSize, UUID: [16]byte{0xff}})
	w.check(err)
}

// snapshot turns the leaf into a base copy below a new leaf.
func (w *world) snapshot(yield func(string)) {
	base := w.leaf
	yield("rename the leaf to a base copy")
	delete(w.files, base.name)
	base.name = fmt.Sprintf("base%d.vhd", w.nextID+100)
	w.files[base.name] = base
	yield("create the new leaf")
	w.leaf = w.create(leafName, base, modelBlocks, false)
	yield("hide the base copy")
	w.check(base.writer.SetHidden(true))
}

// fit resizes a parent that is smaller than the image that is merged into it.
func (w *world) fit(p, x *node, yield func(string)) {
	if w.sizeOf(p) < w.sizeOf(x) {
		yield("resize " + p.name)
		w.check(p.writer.SetSize(w.sizeOf(x)))
	}
}

func (w *world) sizeOf(n *node) int64 {
	img, err := vhd.Parse(n.storage)
	w.check(err)
	return img.Size()
}

// grow makes room for a longer table in some image: its size stays.
func (w *world) grow(yield func(string)) {
	list := w.ancestors()
	if len(list) == 0 {
		return
	}
	p := list[w.rand.IntN(len(list))]
	if w.sizeOf(p) < modelBlocks*vhd.BlockSize {
		yield("grow " + p.name)
		w.check(p.writer.SetSize(modelBlocks * vhd.BlockSize))
	}
}

// moveBlocks moves the blocks of an image to its end.
func (w *world) moveBlocks(yield func(string)) {
	list := append(w.ancestors(), w.leaf)
	p := list[w.rand.IntN(len(list))]
	for b := range int64(modelBlocks) {
		if has, err := p.writer.HasBlock(b); err == nil && has {
			yield(fmt.Sprintf("move block %d of %s", b, p.name))
			w.check(p.writer.MoveBlock(b))
		}
	}
}

// copyBlocks copies the blocks that from has to its parent.
func (w *world) copyBlocks(from, to *node, yield func(string)) {
	for b := range int64(modelBlocks) {
		has, err := from.writer.HasBlock(b)
		w.check(err)
		there, err := to.writer.HasBlock(b)
		w.check(err)
		if has && !there {
			w.check(to.writer.AddBlock(b, []byte{1}, func() { yield(fmt.Sprintf("copy block %d of %s to %s", b, from.name, to.name)) }))
		}
	}
}

// interfere lets the collector do some steps. It is called before each system call.
func (w *world) interfere() {
	if w.atCall != nil {
		w.calls++
		w.atCall(w.calls)
	}
	if !w.busy {
		return
	}
	for n := []int{0, 0, 0, 1, 2, 5, 40}[w.rand.IntN(7)]; n > 0 && w.busy; n-- {
		w.busy = w.next()
	}
}

// readLink, open and modelFile make the world a fileSystem.

func (w *world) readLink(path string) (string, error) {
	w.interfere()
	if path != modelLink || w.target == "" {
		return "", &fs.PathError{Op: "readlink", Path: path, Err: fs.ErrNotExist}
	}
	return w.target, nil
}

func (w *world) open(path string) (file, error) {
	w.interfere()
	n := w.files[filepath.Base(path)]
	if n == nil || filepath.Dir(path) != modelDir {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	return &modelFile{w, n}, nil
}

type modelFile struct {
	w *world
	n *node
}

func (f *modelFile) ReadAt(p []byte, off int64) (int, error) {
	f.w.interfere()
	return f.n.storage.ReadAt(p, off)
}

func (f *modelFile) Close() error                { return nil }
func (f *modelFile) identify() (identity, error) { return identity{1, f.n.ino}, nil }

func modelSource() Source {
	return Source{Link: modelLink, Key: "vdi", MapperDir: mapperDir, Size: modelBlocks * vhd.BlockSize}
}

// readWorld reads one world, with or without a collector, and checks the map.
func readWorld(t *testing.T, seed uint64, undisturbed bool) (known bool) {
	w := newWorld(t, seed)
	if !undisturbed {
		var stop func()
		w.next, stop = pull(func(yield func(string)) { w.collect(yield) }, &w.log)
		defer stop()
		w.busy = true
	}
	set, err := read(context.Background(), w, modelSource())
	if err != nil {
		if undisturbed {
			t.Fatalf("seed %d: %v", seed, err)
		}
		return false
	}
	w.checkMap(set, fmt.Sprintf("seed %d", seed), undisturbed)
	return true
}

// checkMap wants every block with data in the map, and no other one if it is to be exact.
func (w *world) checkMap(set *vhd.BlockSet, name string, exact bool) {
	w.t.Helper()
	for b := range int64(modelBlocks) {
		in, _ := set.Run(b*vhd.BlockSize, 1)
		if w.data[b] && !in {
			w.t.Fatalf("%s: block %d has data and is a hole; steps: %q", name, b, w.log)
		}
		if exact && in != w.data[b] {
			w.t.Fatalf("%s: block %d: in the map %t, has data %t", name, b, in, w.data[b])
		}
	}
}
