package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Files of a run that host and guest both use.
const (
	diskFile   = "disk.img"   // the node's disk, which outlives a boot
	imagesFile = "images.tar" // the container images
)

const containerdSocket = "/run/containerd/containerd.sock"

// pauseImage is what holds a pod's namespaces.
const pauseImage = "docker.io/cryptcsi/pause:dev"

// runNode is the node, in the guest: it makes the machine ready, starts
// containerd and kubelet, and ends when one of them does. It is not called twice
// in one boot. It joins with a taint where there is one.
func runNode(dir, taint string) error {
	ctx := context.Background()
	s := site{dir: dir}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"modules and network", func() error { return nodeNetwork(ctx) }},
		{"disk", func() error { return nodeDisk(ctx) }},
		{"processor", nodeProcessor},
		{"configuration", func() error { return nodeConfig(s, taint) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("node: %s: %w", step.name, err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	s.kub = filepath.Join(filepath.Dir(self), "../.tools/bin/kubernetes")
	containerd, err := start(s.logs(), "containerd", "containerd", "--config=/etc/containerd-e2e.toml")
	if err != nil {
		return err
	}
	return errors.Join(keepKubelet(ctx, s, containerd), containerd.failed())
}

// keepKubelet runs kubelet, again when it has ended, as systemd does; until
// containerd ends, or kubelet does so too often by itself.
func keepKubelet(ctx context.Context, s site, containerd *process) error {
	kill, err := acceptKills()
	if err != nil {
		return err
	}
	var killer net.Conn
	for ends := 0; ends < 10; {
		kubelet, err := start(s.logs(), "kubelet", s.kub, "kubelet", "--config=/etc/kubelet-e2e.json", "--kubeconfig="+s.path("kubelet.kubeconfig"),
			"--hostname-override="+nodeName, "--node-ip="+nodeIP, "--housekeeping-interval=1m", "--v=2")
		if err != nil {
			return err
		}
		if killer != nil {
			_ = killer.Close()
			killer = nil
		}
		select {
		case <-containerd.done:
			return nil
		case killer = <-kill:
			_ = kubelet.cmd.Process.Kill()
			<-kubelet.done
		case <-kubelet.done:
			ends++
			fmt.Println("node:", kubelet.failed())
			if messages, err := command(ctx, "dmesg"); err == nil {
				fmt.Println(messages[max(0, len(messages)-4000):])
			}
		}
	}
	return errors.New("kubelet ends again and again")
}

// acceptKills hands out who connects to killAddress.
func acceptKills() (<-chan net.Conn, error) {
	l, err := net.Listen("tcp", killAddress)
	if err != nil {
		return nil, err
	}
	kill := make(chan net.Conn)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			kill <- conn
		}
	}()
	return kill, nil
}

func nodeNetwork(ctx context.Context) error {
	if err := unix.Sethostname([]byte(nodeName)); err != nil {
		return err
	}
	if err := commands(ctx,
		"modprobe -a overlay loop veth bridge",
		"ip addr add "+nodeIP+"/24 dev eth0",
		"ip link set eth0 up",
		"ip route add default via "+hostIP,
	); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
}

// nodeDisk mounts what must be on a disk: what a reboot leaves as it is, and
// what the overlay that is the guest's root cannot hold.
func nodeDisk(ctx context.Context) error {
	const at = "/run/disk"
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/dev/ubda", at, "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	for _, dir := range []string{"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/loopdriver"} {
		source := filepath.Join(at, filepath.Base(dir))
		if err := errors.Join(os.MkdirAll(source, 0o755), os.MkdirAll(dir, 0o755)); err != nil {
			return err
		}
		if err := unix.Mount(source, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	// As systemd does: what a privileged pod mounts has to be seen by others.
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// nodeProcessor gives /proc/cpuinfo the lines that kubelet wants to see.
func nodeProcessor() error {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	more := "cpu MHz\t\t: 2000.000\nphysical id\t: 0\nsiblings\t: 1\ncore id\t\t: 0\ncpu cores\t: 1\n\n"
	const file = "/run/cpuinfo"
	if err := os.WriteFile(file, []byte(strings.TrimRight(string(text), "\n")+"\n"+more), 0o444); err != nil {
		return err
	}
	return unix.Mount(file, "/proc/cpuinfo", "", unix.MS_BIND, "")
}

func nodeConfig(s site, taint string) error {
	if err := os.MkdirAll("/etc/cni/net.d", 0o755); err != nil {
		return err
	}
	taints := "[]"
	if taint != "" {
		taints = `[{"key": "` + taint + `", "effect": "NoSchedule"}]`
	}
	return errors.Join(
		os.WriteFile("/etc/containerd-e2e.toml", []byte(containerdConfig), 0o644),
		os.WriteFile("/etc/kubelet-e2e.json", []byte(strings.NewReplacer("CA-FILE", s.path("pki/ca.crt"), "TAINTS", taints).Replace(kubeletConfig)), 0o644),
		os.WriteFile("/etc/cni/net.d/10-bridge.conflist", []byte(networkConfig), 0o644),
	)
}

const containerdConfig = `version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    # Starting a Go program takes this kernel a third of a second, and runc is
    # started five times for a container.
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "/usr/bin/crun"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
`

// On one slow processor pods are started by and by; nothing is ever evicted. A
// volume is attached and detached when the node's status says that it is or is
// not in use, and grows when its pod is looked at: both happen soon.
const kubeletConfig = `{
  "kind": "KubeletConfiguration", "apiVersion": "kubelet.config.k8s.io/v1beta1",
  "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true}, "x509": {"clientCAFile": "CA-FILE"}},
  "authorization": {"mode": "Webhook"},
  "cgroupDriver": "cgroupfs", "enforceNodeAllocatable": [], "failSwapOn": false,
  "clusterDNS": ["` + hostIP + `"], "clusterDomain": "cluster.local", "resolvConf": "",
  "containerRuntimeEndpoint": "unix://` + containerdSocket + `",
  "evictionHard": {"memory.available": "16Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
  "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
  "serializeImagePulls": true, "nodeStatusUpdateFrequency": "1s", "nodeStatusReportFrequency": "10s", "syncFrequency": "5s", "registerWithTaints": TAINTS
}
`

const networkConfig = `{"cniVersion": "0.4.0", "name": "pods", "plugins": [{
  "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "` + podNet + `"}]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/run/cni"}
}]}
`
