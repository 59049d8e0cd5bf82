package loopdriver

import (
	"maps"
	"slices"
)

// habits are what other drivers do that somebody who stands in front of them
// has to put up with, by their names, as far as a driver of files can do it.
// NodeExpansion is what they answer for block volumes.
func habits() map[string]Config {
	return map[string]Config{
		"ebs.csi.aws.com":           {NodeExpansion: ExpandMount, Faults: []string{faultPickyExpand, faultShortName}},
		"pd.csi.storage.gke.io":     {Faults: []string{faultPickyExpand}},
		"disk.csi.azure.com":        {DeviceKey: "LUN", Faults: []string{faultStack, faultLateGrowth}},
		"cinder.csi.openstack.org":  {Faults: []string{faultStack, "error:NodeExpandVolume=INTERNAL"}},
		"csi.vsphere.vmware.com":    {NodeExpansion: ExpandMount, DeviceKey: "diskUUID", Faults: []string{faultOneMount, faultPickyExpand, faultLateGrowth}},
		"dobs.csi.digitalocean.com": {NodeExpansion: ExpandMount, DeviceKey: "dobs.csi.digitalocean.com/volume-name", Faults: []string{faultPickyExpand, faultRoundDown}},
		"csi.hetzner.cloud":         {NoStage: true},
		"linodebs.csi.linode.com":   {Faults: []string{faultStack, faultRoundDown}},
		"csi.scaleway.com":          {NodeExpansion: ExpandMount, DeviceKey: "scw-id", Faults: []string{faultForgetful}},
		"topolvm.io":                {NodeExpansion: ExpandMount, NoStage: true, SingleWriter: true, Faults: []string{faultStack}},
		"linstor.csi.linbit.com":    {NodeExpansion: ExpandMount, NoStage: true, DeviceKey: "linstor.csi.linbit.com/device-path", Faults: []string{faultFormatEarly}},
		"rbd.csi.ceph.com":          {NodeExpansion: ExpandMount, NoAttach: true, Faults: []string{faultPickyExpand}},
		"driver.longhorn.io":        {NodeExpansion: ExpandMount, Faults: []string{faultPickyExpand}},
		"hostpath.csi.k8s.io":       {FixedType: true, Faults: []string{faultNoGrow, faultForgetful}},
	}
}

// Others are the drivers that Like knows.
func Others() []string { return slices.Sorted(maps.Keys(habits())) }

// Like returns cfg with the name and the habits of another driver, beside those
// that cfg has; ok is false where none are known.
func Like(name string, cfg Config) (_ Config, ok bool) {
	h, ok := habits()[name]
	if !ok {
		return cfg, false
	}
	cfg.Name, cfg.NodeExpansion, cfg.DeviceKey = name, h.NodeExpansion, h.DeviceKey
	cfg.NoStage = cfg.NoStage || h.NoStage
	cfg.NoAttach = cfg.NoAttach || h.NoAttach
	cfg.FixedType = cfg.FixedType || h.FixedType
	cfg.SingleWriter = cfg.SingleWriter || h.SingleWriter
	cfg.Faults = append(h.Faults, cfg.Faults...)
	return cfg, true
}
