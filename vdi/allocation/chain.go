package allocation

import (
	"errors"
	"fmt"
	"path/filepath"

	"xapi-nbd/vdi/vhd"
)

// maxLayers is more than SM allows (30). It bounds the work for damaged images.
const maxLayers = 64

// layer is one open image of a chain.
type layer struct {
	path  string
	file  file
	id    identity
	image *vhd.Image
}

// openLayer opens and parses the image at path.
func openLayer(fsys fileSystem, path string) (layer, error) {
	f, err := fsys.open(path)
	if err != nil {
		return layer{}, err
	}
	l := layer{path: path, file: f}
	if l.id, err = f.identify(); err == nil {
		l.image, err = vhd.Parse(f)
	}
	if err != nil {
		f.Close()
		return layer{}, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return l, nil
}

// chain is the images of one disk, from the top to the last parent. All are open.
type chain []layer

// close closes all images. They were only read, so errors can be ignored.
func (c chain) close() {
	for _, l := range c {
		l.file.Close()
	}
}

// openChain opens the chain of the image at path. The parents are in the same folder
// or in that of device-mapper. The caller closes what is returned, also after an error.
func openChain(fsys fileSystem, path string, src Source) (chain, error) {
	top, err := openLayer(fsys, path)
	if errors.Is(err, vhd.ErrNotVHD) {
		return nil, unknown("not_vhd", err)
	}
	if err != nil {
		return nil, err
	}
	c := chain{top}
	if err := checkLeaf(top, src); err != nil {
		return c, err
	}
	for {
		last := c[len(c)-1]
		switch {
		case last.image.IsEncrypted():
			return c, unknown("encrypted", fmt.Errorf("%s is encrypted", filepath.Base(last.path)))
		case !last.image.HasParent():
			return c, nil
		case last.image.HasRawParent():
			return c, unknown("raw_parent", fmt.Errorf("%s has a raw parent", filepath.Base(last.path)))
		case len(c) == maxLayers:
			return c, unknown("too_many_images", fmt.Errorf("the chain has more than %d images", maxLayers))
		}
		parent, err := openParent(fsys, last, src.MapperDir)
		if err != nil {
			return c, err
		}
		c = append(c, parent)
	}
}

// openParent opens the parent of a layer. On LVM the name of the parent is one of
// device-mapper, while the path of the child may be in the folder of the volume group, so
// openParent tries both folders and compares the UUID. Damaged images whose parents form a
// loop end at maxLayers.
func openParent(fsys fileSystem, child layer, mapperDir string) (layer, error) {
	dirs := []string{filepath.Dir(child.path)}
	if mapperDir != dirs[0] {
		dirs = append(dirs, mapperDir)
	}
	var errs []error
	for _, dir := range dirs {
		parent, err := openLayer(fsys, filepath.Join(dir, child.image.ParentName()))
		if err == nil {
			if parent.image.UUID() == child.image.ParentUUID() {
				return parent, nil
			}
			parent.file.Close()
			err = fmt.Errorf("%s is another image than the parent of %s", filepath.Base(parent.path), filepath.Base(child.path))
		}
		errs = append(errs, err)
	}
	return layer{}, errors.Join(errs...)
}

// errChanged means that the chain has to be read again.
var errChanged = errors.New("an image changed while its chain was read")

// recheck opens every path again and compares the images with those that were read. The
// error matches errChanged if they differ.
func (c chain) recheck(fsys fileSystem, src Source) error {
	path, err := leafPath(fsys, src)
	if err != nil || path != c[0].path {
		return errors.Join(errChanged, err)
	}
	for _, l := range c {
		again, err := openLayer(fsys, l.path)
		if err != nil {
			return fmt.Errorf("%w: %w", errChanged, err)
		}
		again.file.Close()
		if again.id != l.id || !again.image.SameMetadata(l.image) {
			return fmt.Errorf("%w: %s", errChanged, filepath.Base(l.path))
		}
	}
	return nil
}
