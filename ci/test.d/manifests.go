// Renders folders of docs/kubernetes as `kubectl kustomize` does, and checks what comes out of them: that the API server's types
// know all that is said, and that the objects fit one another. Prints their names.
//
//	manifests HANDLER VERSION FOLDER...
//
// HANDLER is what containerd's configuration calls husk, VERSION that of the image.
package main

import (
	"fmt"
	"os"
	"strings"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	node "k8s.io/api/node/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

func main() {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{apps.AddToScheme, core.AddToScheme, node.AddToScheme} {
		if err := add(scheme); err != nil {
			panic(err)
		}
	}
	// What a type does not know is an error.
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	check := checker{handler: os.Args[1], version: os.Args[2], decoder: decoder}
	status := 0
	for _, folder := range os.Args[3:] {
		objects, err := check.render(folder)
		if err == nil {
			err = check.all(objects)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", folder, err)
			status = 1
		}
	}
	os.Exit(status)
}

type checker struct {
	handler, version string
	decoder          runtime.Decoder
}

func (check checker) render(folder string) ([]runtime.Object, error) {
	rendered, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), folder)
	if err != nil {
		return nil, err
	}
	var objects []runtime.Object
	for _, resource := range rendered.Resources() {
		text, err := resource.AsYAML()
		if err != nil {
			return nil, err
		}
		object, _, err := check.decoder.Decode(text, nil, nil)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", resource.CurId(), err)
		}
		fmt.Printf("%s: %s %s\n", folder, resource.GetKind(), resource.GetName())
		objects = append(objects, object)
	}
	return objects, nil
}

// all checks the objects of a folder: one DaemonSet, in a namespace that is among them.
func (check checker) all(objects []runtime.Object) error {
	var namespace string
	var installer *apps.DaemonSet
	var class *node.RuntimeClass
	for _, object := range objects {
		switch object := object.(type) {
		case *core.Namespace:
			namespace = object.Name
		case *apps.DaemonSet:
			installer = object
		case *node.RuntimeClass:
			class = object
		default:
			return fmt.Errorf("nothing is known of a %T", object)
		}
	}
	if installer == nil {
		return fmt.Errorf("it has no DaemonSet")
	}
	if installer.Namespace != namespace {
		return fmt.Errorf("the DaemonSet's namespace %q is not the one that is made, %q", installer.Namespace, namespace)
	}
	if class != nil {
		if class.Handler != check.handler {
			return fmt.Errorf("the RuntimeClass has the handler %q, and containerd %q", class.Handler, check.handler)
		}
		// A pod of the class must go where the DaemonSet has been.
		on := installer.Spec.Template.Spec.NodeSelector
		if class.Scheduling == nil || labels.FormatLabels(class.Scheduling.NodeSelector) != labels.FormatLabels(on) {
			return fmt.Errorf("the RuntimeClass is not for the nodes %v", on)
		}
	}
	return check.pods(installer)
}

func (check checker) pods(installer *apps.DaemonSet) error {
	selector, err := meta.LabelSelectorAsSelector(installer.Spec.Selector)
	if err != nil {
		return err
	}
	pod := installer.Spec.Template
	if selector.Empty() || !selector.Matches(labels.Set(pod.Labels)) {
		return fmt.Errorf("the DaemonSet selects %q, and its pods are %q", selector, labels.FormatLabels(pod.Labels))
	}
	volumes := map[string]bool{}
	for _, volume := range pod.Spec.Volumes {
		volumes[volume.Name] = true
	}
	for _, container := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
		registry, _, named := strings.Cut(container.Image, "/")
		if !named || !strings.Contains(registry, ".") || !strings.HasSuffix(container.Image, ":"+check.version) {
			return fmt.Errorf("the image %q is of no registry, or not of version %s", container.Image, check.version)
		}
		for _, mount := range container.VolumeMounts {
			if !volumes[mount.Name] {
				return fmt.Errorf("container %s mounts %s, which is no volume", container.Name, mount.Name)
			}
		}
	}
	return nil
}
